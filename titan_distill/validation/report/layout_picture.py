"""Picture of a role's layout: its ranks as cells, grouped by what they share.

A row of cells shares each weight matrix (tensor parallel), the rows of a group share the tokens of a sample (sequence
parallel), the groups of a frame each load other samples and shard one replica of the weights (FSDP), and each frame is
a replica. A large layout is cut off, and the picture says how much is left out.
"""

from __future__ import annotations

import math

from titan_distill.config.degrees import Degrees

CELL, GAP, PAD = 26, 10, 8
"""Size of a cell, distance between groups and inner margin of a frame, in pixels."""
GROUPS_PER_LINE, MAX_GROUPS, MAX_FRAMES, MAX_SIDE = 8, 16, 4, 8
"""Number of groups per line, and of groups per frame, of frames, and of rows and columns of a group that are drawn."""


def layout_picture(degrees: Degrees) -> str:
    """Returns the picture as SVG. Its colours are those of the page."""
    columns, rows = min(degrees.tensor, MAX_SIDE), min(degrees.sequence, MAX_SIDE)
    num_groups, num_frames = min(degrees.dp_shard, MAX_GROUPS), min(degrees.dp_replicate, MAX_FRAMES)
    per_line = min(num_groups, max(1, GROUPS_PER_LINE // columns))
    step_x, step_y = columns * CELL + GAP, rows * CELL + GAP
    width = per_line * step_x - GAP + 2 * PAD
    height = math.ceil(num_groups / per_line) * step_y - GAP + 2 * PAD
    parts = []
    for frame in range(num_frames):
        top = frame * (height + GAP)
        parts.append(f'<rect class="frame" x="1" y="{top + 1}" width="{width}" height="{height}" rx="6"/>')
        for group in range(num_groups):
            line, place = divmod(group, per_line)
            first = (frame * degrees.dp_shard + group) * degrees.model_parallel
            for row in range(rows):
                for column in range(columns):
                    x, y = 1 + PAD + place * step_x + column * CELL, top + 1 + PAD + line * step_y + row * CELL
                    rank = first + row * degrees.tensor + column
                    parts.append(f'<rect class="cell" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>')
                    parts.append(f'<text x="{x + CELL / 2}" y="{y + CELL / 2}">{rank}</text>')
    total_height = num_frames * (height + GAP) - GAP + 2
    box = f'viewBox="0 0 {width + 2} {total_height}" width="{width + 2}" height="{total_height}"'
    label = f"{degrees.world_size} rank{'s' if degrees.world_size > 1 else ''}: {degrees}"
    return f'<svg class="layout" role="img" aria-label="{label}" {box}>{"".join(parts)}</svg>'


def left_out(degrees: Degrees) -> str:
    """Returns a note on what the picture does not show; empty if it shows all ranks."""
    drawn = (
        min(degrees.dp_replicate, MAX_FRAMES)
        * min(degrees.dp_shard, MAX_GROUPS)
        * min(degrees.sequence, MAX_SIDE)
        * min(degrees.tensor, MAX_SIDE)
    )
    num_more = degrees.world_size - drawn
    return f"{num_more} more ranks, arranged alike, are not drawn" if num_more else ""
