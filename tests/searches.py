"""
Whether `merge_eval.py --search fine` picks what looking at every image under every lambda that it tries would
pick, over many searches: every rule, on all tasks and on each half of them.

    python tests/searches.py tiny                 # after run_all.sh; the flags of merge_eval.py
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import merge_eval
from common import Evaluator, normalized_accuracy
from lib import flags, merging, race
from lib.study import open_study, run


def main(args):
    there, error = open_study(args, merge_eval.__file__, "finetune.json"), args.error or 0.01
    evaluator = Evaluator(there.encoder, there.device, there.dtype)
    names, same, shares, searches = list(there.tasks), 0, [], 0
    half = len(names) // 2
    for rule in merging.RULES:
        lambdas = flags.even_grid("--lambda-max", 0, merging.RULES[rule].largest, args.lambdas).tolist()
        for some in (names, names[:half], names[half:]):
            evaluator.use_vectors([merging.merge(rule, there.source, some, there.encoder, there.seed)])
            splits = {name: there.tasks[name].splits["val"] for name in some}
            single = {name: there.single_task["val"][name] for name in some}
            heads, hits = [there.heads[name] for name in some], {}

            def right_of(lam):
                """{task: (N_t,) bool}, all images under a lambda."""
                if lam not in hits:
                    rows = evaluator.predictions(list(splits.values()), heads, [(lam,)])
                    hits[lam] = {name: classes[0].numpy() == split.labels
                                 for (name, split), classes in zip(splits.items(), rows, strict=True)}
                return hits[lam]

            def look(part, lams):
                found = []
                for name, split in zip(some, part, strict=True):
                    place = np.searchsorted(order[name][0], split.indices)
                    found.append(np.stack([right_of(lam)[name][order[name][1][place]] for lam in lams]))
                return found

            order, right = {}, {}
            for name, split in splits.items():
                order[name] = np.sort(split.indices), split.indices.argsort()
            best = race.fine_search(look, splits, single, lambdas, error, right_of(0.0), right, lambda: None)
            of_tried = {}
            for lam in sorted(right):
                accuracy = {name: hit.mean() for name, hit in right_of(lam).items()}
                of_tried[lam] = normalized_accuracy(accuracy, single)
            pick = max(of_tried, key=of_tried.get)
            of_grid = max(lambdas, key=lambda lam: of_tried[lam])
            n = len(right[0.0])
            looked = sum(map(len, right.values())) - n
            searches += 1
            same += best == pick
            shares.append(looked / (n * (len(lambdas) - 1)))
            print(f"{rule}, {len(some)} tasks from {some[0]}: {best:g} by {looked} images, {pick:g} by all "
                  f"{n * (len(right) - 1)}; {of_grid:g} of the grid by {n * (len(lambdas) - 1)}; validation "
                  f"{of_tried[best]:.4f}, {of_tried[pick]:.4f}, {of_tried[of_grid]:.4f}", flush=True)
    print(f"{same} of {searches} searches pick the best of all they try, at error {error:g}, by "
          f"{np.mean(shares):.2f} of the grid's images ({min(shares):.2f} to {max(shares):.2f})")


if __name__ == "__main__":
    run(main, merge_eval.parse_args)
