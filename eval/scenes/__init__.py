"""Procedural scenes with perfect ground truth, and the questions about them."""

from .desk import make_desk, make_desks
from .pope import cooccurrence, pope_questions
from .scene import PATCH, Bar, Glyph, Part, Scene, SceneObject, coverage, make_scene, make_scenes
from .shapes import COLORS, OBJECTS, PARTNER, PLURALS, SHAPES, caption, with_article

__all__ = [
    "COLORS",
    "OBJECTS",
    "PARTNER",
    "PATCH",
    "PLURALS",
    "SHAPES",
    "Bar",
    "Glyph",
    "Part",
    "Scene",
    "SceneObject",
    "caption",
    "cooccurrence",
    "coverage",
    "make_desk",
    "make_desks",
    "make_scene",
    "make_scenes",
    "pope_questions",
    "with_article",
]
