"""The determinism contract, tried on a checkpoint: how many comparisons differ with the flag off and on.

python scripts/verify.py                              the default model, four minutes on 2 cores
python scripts/verify.py --precision fp32 --size 4    four times the requests, every batch size from 1 to 50
torchrun --nproc_per_node 3 scripts/verify.py         three processes that share the model, against one
All flags of generate.py that choose a model or a device apply. A comparison is one completion, its tokens and the exact
bits of its logprobs, against the same request alone with nothing varied. Exit status 1 where the flag does not hold."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate  # noqa: E402
from tests import contract  # noqa: E402


def main() -> int:
    args, off, failed = generate.parse_args(size=1), {}, False
    for name, off[name], _ in contract.promises(*contract.prepare(args, False)):
        generate.tp.progress(f"flag off, {name}: {off[name]}")
    print("| what varies | flag off: differ of compared, first token | flag on |\n|---|---|---|")
    args, model, requests = contract.prepare(args, True)
    for name, found, differs in contract.promises(args, model, requests):
        print(f"| {name} | {off[name]} | {found} |", flush=True)
        failed |= differs
    print("\n| a rule broken on purpose, the flag on | differ of compared, first token |\n|---|---|")
    for name, found, differs in contract.controls(model, requests):
        print(f"| {name} | {found} |", flush=True)
        failed |= not differs
    print("\nThe contract does not hold, or a control did not fail." if failed else "\nThe contract holds.")
    return int(failed)


if __name__ == "__main__":
    generate.command(main)
