"""Counts lines of code: lines that hold a token of Python other than a comment or a docstring.

`python scripts/count_code.py [COMMIT]` prints the count of each folder, of the working tree or of a commit.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

FOLDERS = ("titan_distill", "kernels", "examples", "scripts")
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def count(source: str) -> int:
    """The number of lines of `source` that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # A string that stands alone is a docstring: of a module, class, function, or of the field above it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, encoding="utf-8").stdout


def sources(commit: str | None) -> dict[str, str]:
    """Path -> text of every Python file under FOLDERS."""
    if commit is None:
        paths = git("ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS).split()
        return {
            path: Path(path).read_text(encoding="utf-8")
            for path in paths
            if path.endswith(".py") and Path(path).exists()
        }
    paths = git("ls-tree", "-r", "--name-only", commit, "--", *FOLDERS).split()
    return {path: git("show", f"{commit}:{path}") for path in paths if path.endswith(".py")}


def main() -> None:
    commit = sys.argv[1] if len(sys.argv) > 1 else None
    totals: Counter[str] = Counter()
    for path, source in sources(commit).items():
        totals["/".join(Path(path).parts[:-1])] += count(source)
    for folder, lines in sorted(totals.items()):
        print(f"{lines:6d}  {folder}")
    print(f"{sum(totals.values()):6d}  {commit or 'working tree'}")


if __name__ == "__main__":
    main()
