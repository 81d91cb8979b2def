"""Model families, one file each: where a stock model keeps its tower, layers, projector and decoder.

An adapter describes one family's modules and geometry as an `Anatomy`; it knows no policy.
"""
