"""lm-eval's loglikelihood tasks over `hotset serve` and over transformers, on the same weights.

Runs in an environment of its own, with lm-eval in it (`pip install 'lm-eval[api,hf]'`), from the
root of the repository. The server runs in hotset's:

    hotset serve --dtype float32 --port 8001
    python benchmarks/lm_eval/compare.py http://127.0.0.1:8001 FOLDER_OF_THE_MODEL

Prints a table of the scores and fails where two log-likelihoods differ by more than 1e-3 or one
run takes a continuation for the greedy one and the other does not.
"""

import argparse
import json
import urllib.request
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = ["hotset_choice", "hotset_last_words"]
MOST_APART = 1e-3


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the server, without a path")
    parser.add_argument("folder", help="of the model it serves")
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/v1/models") as answer:
        name = json.load(answer)["data"][0]["id"]
    served = evaluate(
        "local-completions",
        {
            "model": name,
            "base_url": f"{args.url}/v1/completions",
            "tokenizer": args.folder,
            "tokenized_requests": True,
            "num_concurrent": 8,
        },
    )
    direct = evaluate("hf", {"pretrained": args.folder, "dtype": "float32", "device": "cpu"})
    print("| task | metric | hotset serve | transformers |\n|---|---|---|---|")
    for task in TASKS:
        for metric in sorted(served["results"][task]):
            value = served["results"][task][metric]
            if isinstance(value, float) and "stderr" not in metric:
                other = direct["results"][task][metric]
                print(f"| {task} | {metric.split(',')[0]} | {value:.5f} | {other:.5f} |")
    ours, theirs = answers(served), answers(direct)
    apart = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    alike = sum(a[1] == b[1] for a, b in zip(ours, theirs, strict=True))
    print(f"\n{len(ours)} log-likelihoods, at most {apart:.1e} apart; is-greedy equal in {alike}")
    if apart > MOST_APART or alike < len(ours):
        raise SystemExit("they differ")


def evaluate(model: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """The results of one model on all tasks, with its answers."""
    found: dict[str, Any] = simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=TASKS,
        task_manager=TaskManager(include_path="benchmarks/lm_eval"),
        bootstrap_iters=0,
        log_samples=True,
    )
    return found


def answers(found: dict[str, Any]) -> list[tuple[float, bool]]:
    """Each log-likelihood, and whether the continuation is the greedy one, in one order."""
    entries = []
    for task in TASKS:
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"]):
            for response in sample["resps"]:
                logprob, is_greedy = response[0]
                entries.append((float(logprob), str(is_greedy) == "True"))
    return entries


if __name__ == "__main__":
    main()
