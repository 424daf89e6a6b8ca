"""The determinism contract, tried on a checkpoint: how many comparisons differ, flag off and on.

python scripts/verify.py                              the default model, four minutes on 2 cores
python scripts/verify.py --precision fp32 --size 4    four times the requests, batches of 1 to 50
torchrun --nproc_per_node 3 scripts/verify.py         three processes that share it, against one

All flags of generate.py that choose a model or a device apply. A comparison is one completion, its
tokens and the exact bits of its logprobs, against the same request alone with nothing varied. Exit
status 1 where the flag does not hold."""

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has names that would hide those of packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts import interrupts

    interrupts.end_quietly()

import generate
from scripts import cli, contract


def main() -> int:
    args = cli.parse_args(size=1)
    off = {}
    for name, found, _ in contract.promises(*contract.prepare(args, deterministic=False)):
        off[name] = found
        cli.progress(f"flag off, {name}: {found}")

    failed = False
    print("| what varies | flag off: differ of compared, first token | flag on |\n|---|---|---|")
    args, model, requests = contract.prepare(args, deterministic=True)
    for name, found, differs in contract.promises(args, model, requests):
        print(f"| {name} | {off[name]} | {found} |", flush=True)
        failed = failed or differs

    print(
        "\n| a rule broken on purpose, the flag on | differ of compared, first token |\n|---|---|"
    )
    for name, found, differs in contract.controls(args, model, requests):
        print(f"| {name} | {found} |", flush=True)
        failed = failed or not differs

    if failed:
        print("\nThe contract does not hold, or a control did not fail.")
    else:
        print("\nThe contract holds.")
    return int(failed)


if __name__ == "__main__":
    generate.command(main)
