"""Model families, one file each: where a stock model keeps its tower, layers, projector and decoder.

An adapter knows one family's modules and geometry; it knows no policy. `Anatomy` is all it says.
"""
