"""Mean IoU as a module for `evaluate.load`, fed with whole label maps: what the benchmark compares with.

It does what the Hub's module of this name does - collect all maps through Arrow, then histograms per image in NumPy -
so that the comparison runs offline. Online, `benchmark_loss.py --mean_iou mean_iou` takes the Hub's own.
"""

import datasets
import evaluate
import numpy as np


class MeanIoU(evaluate.Metric):
    def _info(self):
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        features = datasets.Features({"predictions": maps, "references": maps})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references, num_labels, ignore_index):
        intersection, union = np.zeros(num_labels), np.zeros(num_labels)
        for prediction, reference in zip(predictions, references, strict=True):
            prediction, reference = np.array(prediction), np.array(reference)
            valid = reference != ignore_index
            prediction, reference = prediction[valid], reference[valid]
            common = prediction[prediction == reference]
            counts = [np.bincount(maps, minlength=num_labels) for maps in (common, prediction, reference)]
            intersection += counts[0]
            union += counts[1] + counts[2] - counts[0]
        with np.errstate(invalid="ignore"):
            iou = intersection / union
        return {"mean_iou": float(np.nanmean(iou)), "per_category_iou": iou.tolist()}
