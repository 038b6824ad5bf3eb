"""Which share of a script is the paper: flags, presets, mathematics, networks, the loop without bookkeeping.

    python benchmarks/paper_share.py [FILE ...]            # default: the eight scripts

Counted by one rule for all: of the non-blank lines, bookkeeping is the module's docstring, the imports, the
last line, `act` (what an evaluation asks of the agent), and in `train` every statement that names the run's
handle (but for its generators), its evaluation environments, worlds, backbones and weights to load, saving,
restoring, evaluating and logging. All the rest is the paper's. A compound statement is counted by its parts.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "bc_warmup ppo_vla grpo_vla sac iql cql td3_bc decision_transformer".split()
WORDS = {
    "run",
    "save",
    "saved",
    "evaluate_now",
    "eval_envs",
    "evaluate",
    "make_envs",
    "load_backbone",
    "load_weights",
}
WORDS |= {
    "export",
    "load_dataset",
    "scalars",
    "compile_update",
    "write_transitions",
    "check_append",
    "own",
    "recent",
}


def names(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def generator(node):
    """Does the statement name the run for a generator alone?"""
    text = ast.unparse(node)
    return "run.generator(" in text and text.count("run.") == text.count("run.generator(")


def bookkeeping(statements):
    """-> the numbers of the lines that are no paper's."""
    lines = set()
    for node in statements:
        blocks = [getattr(node, name, []) for name in ("body", "orelse")]
        if isinstance(node, ast.FunctionDef):
            if node.name in ("save", "evaluate_now", "due"):
                lines |= set(range(node.lineno, node.end_lineno + 1))
        elif any(blocks):
            head = node.test if isinstance(node, ast.If | ast.While) else None
            inner = set().union(*(bookkeeping(block) for block in blocks))
            whole = set(range(blocks[0][0].lineno, node.end_lineno + 1))
            lines |= inner
            if inner >= whole or (isinstance(node, ast.If) and names(head) & WORDS):
                lines |= set(range(node.lineno, node.end_lineno + 1))
        elif names(node) & WORDS and not generator(node):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def count(path):
    """-> lines of the paper, non-blank lines."""
    text = path.read_text()
    tree, other = ast.parse(text), set()
    for node in tree.body:
        span = set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.If):
            other |= span
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            other |= {node.lineno, node.body[0].lineno} | bookkeeping(node.body[1:])
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if getattr(method, "name", "") == "act":
                other |= set(range(method.lineno, method.end_lineno + 1))
    full = {number for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    return len(full - other), len(full)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or [ROOT / f"{name}.py" for name in SCRIPTS]):
        paper, full = count(path)
        print(f"{path.name:26} {paper:4} of {full:4} lines: {paper / full:.0%}")
