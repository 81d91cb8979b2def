"""The tiny trained test models: how they are built, trained, measured and described."""
