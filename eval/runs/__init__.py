"""YAML-driven runs: models x policies x budgets on one set of scenes, resumable cell by cell."""
