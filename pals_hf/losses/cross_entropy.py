"""Plain cross-entropy: the baseline, on the same code path as PALS."""

from torch import Tensor, nn

from ..functional import soft_label_cross_entropy


class CrossEntropyLoss(nn.Module):
    """Cross-entropy with one-hot labels at the labels' resolution, averaged over labelled pixels.

    [`soft_label_cross_entropy`] with `beta=0`.

    Args:
        ignore_index: label of void pixels.

    Inputs:
        `loss(logits, labels, features=None, num_items=None)`: logits `(B, C, h, w)`, labels `(B, H, W)`; `features`
        are not used; `num_items` replaces the number of labelled pixels as the divisor.

    Attributes:
        parts: detached scalars of the last call: `one_hot`.
    """

    def __init__(self, ignore_index: int = 255):
        super().__init__()
        self.ignore_index = ignore_index
        self.parts: dict[str, Tensor] = {}

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        loss, self.parts = soft_label_cross_entropy(
            logits, labels, ignore_index=self.ignore_index, num_items=num_items, return_parts=True
        )
        return loss

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}"
