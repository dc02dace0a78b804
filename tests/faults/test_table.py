"""docs/reliability.md and the tests are in step: each row names the test files that inject its fault, and how often.

python tests/faults/test_table.py        # rewrites the last column of the table from the tests there are
"""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

from lib.files import atomic_write, repository_root

ROWS = range(1, 53)
TABLE = repository_root() / "docs" / "reliability.md"


def found_by_row() -> dict[int, str]:
    """`{20: "faults/test_runs 2", …}`: for each number in the names of test functions, their files and how many."""
    found: defaultdict[int, Counter] = defaultdict(Counter)
    folder = repository_root() / "tests"
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_f"):
                numbers = re.match(r"test_((?:f\d+_)+)", node.name)
                for number in re.findall(r"\d+", numbers[1]) if numbers else ():
                    found[int(number)][path.relative_to(folder).with_suffix("").as_posix()] += 1
    return {row: ", ".join(f"{name} {count}" for name, count in sorted(found[row].items())) for row in sorted(found)}


def table() -> dict[int, list[str]]:
    """Number → the cells of its row."""
    rows = [line.strip("|\n ").split(" | ") for line in TABLE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    return {int(cells[0]): cells for cells in rows}


def test_every_row_says_which_tests_inject_it_and_no_test_is_left_out():
    rows = {number: cells[-1] for number, cells in table().items()}
    assert list(rows) == list(ROWS)
    assert rows == found_by_row()


def test_every_row_says_what_goes_wrong_and_what_holds():
    assert all(len(cells) == 4 and all(cells) for cells in table().values())


def rewrite(path: Path = TABLE) -> None:
    found = found_by_row()

    def renewed(line: str) -> str:
        match = re.match(r"\| (\d+) \|", line)
        return f"{line.rsplit(' | ', 1)[0]} | {found.get(int(match[1]), 'none')} |" if match else line

    atomic_write(path, "\n".join(map(renewed, path.read_text().splitlines())) + "\n")


if __name__ == "__main__":
    rewrite()
