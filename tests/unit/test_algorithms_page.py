"""docs/algorithms.md: whatever cites it names a section that it has, and its numbers are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import REPOSITORY

from titan_distill.models.wan.config import FLAVORS
from titan_distill.observability.flops import forward_flops

PAGE = (REPOSITORY / "docs" / "algorithms.md").read_text()
SECTIONS = re.findall(r"^## (.+)$", PAGE, re.M)
FOLDERS = ("titan_distill", "kernels", "examples", "benchmarks", "scripts", "tests")


def test_every_citation_names_a_section() -> None:
    """As docs/algorithms.md, "Section"; a line may end within it."""
    citation = re.compile(r'(docs/)?algorithms\.md(?:, "([^"]+)")?')
    found: dict[str, list[tuple[str, str]]] = {}
    for path in (path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")):
        if path != Path(__file__):
            found[str(path)] = citation.findall(" ".join(path.read_text().split()))
    assert sum(map(len, found.values())) >= 6
    assert not [(path, cited) for path, all_cited in found.items() for cited in all_cited if cited[1] not in SECTIONS]
    assert not [path for path, all_cited in found.items() for folder, _ in all_cited if not folder]


def table(section: str) -> list[list[str]]:
    """Cells of the section's first table, without its header."""
    lines = PAGE.split(f"## {section}\n")[1].split("\n|", 1)[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("cells", table("FLOPs of a forward"), ids=lambda cells: cells[0])
def test_forwards_cost_what_the_page_says(cells: list[str]) -> None:
    flavor, tokens = cells[0].removesuffix(" tokens").split(", ")
    total = forward_flops(FLAVORS[flavor], int(tokens.replace(",", ""))).total / 1e12
    assert total == pytest.approx(float(cells[-1]), abs=0.5)


@pytest.mark.parametrize("cells", table("Sizes of Wan"), ids=lambda cells: cells[0])
def test_sizes_are_those_of_the_page(cells: list[str]) -> None:
    config = FLAVORS[cells[0].split("-")[1]]
    sizes = (config.num_layers, config.inner_dim, config.ffn_dim, config.num_attention_heads)
    assert sizes == tuple(map(int, cells[1:5]))
