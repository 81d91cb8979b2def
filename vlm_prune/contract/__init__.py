"""What the engine and plug-ins share: what a policy is and sees, and what an adapter says about a model.

Policies and adapters import this package (and the kernels) and nothing else of the engine.
"""
