"""The small world of the examples: drawn shapes that move, captions for them, and a scorer that reads them.

`job.imports = ["tiny_world"]` makes `validation.scorer = "shapes"` known, as a user's own module would.
"""

from tiny_world.reader import shapes_scores

__all__ = ["shapes_scores"]
