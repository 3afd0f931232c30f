"""What holds for every loss, then what is each one's own."""

import pytest
import reference
import torch
import torch.nn.functional as F

from pals_hf.functional import Affinity
from pals_hf.functional.pixel_losses import mean_over_pixels
from pals_hf.losses import PRESETS, CrossEntropyLoss, FocalLoss, LabelSmoothingLoss, MarginLoss, PALSLoss

LOSSES = {
    "pals": PALSLoss(),
    "ce": CrossEntropyLoss(),
    "label_smoothing": LabelSmoothingLoss(),
    "focal": FocalLoss(),
    "margin": MarginLoss(margin=2.0),
}


@pytest.fixture
def batch():
    logits, features = 3 * torch.randn(2, 4, 6, 8), torch.randn(2, 5, 6, 8)
    labels = torch.randint(0, 4, (2, 24, 32))
    labels[:, :6] = 255
    return logits, labels, features


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


class TestEveryLoss:
    def test_is_a_scalar_that_trains(self, loss, batch):
        logits, labels, features = batch
        logits.requires_grad_()
        value = loss(logits, labels, features)
        value.backward()
        assert value.shape == ()
        assert logits.grad.isfinite().all()
        assert logits.grad.norm() > 0

    def test_void_is_no_part_of_the_mean(self, loss, batch):
        logits, labels, features = batch
        count = (labels != 255).sum()
        torch.testing.assert_close(
            loss(logits, labels, features, num_items=2 * count) * 2, loss(logits, labels, features)
        )

    def test_all_void(self, loss, batch):
        logits, labels, features = batch
        logits.requires_grad_()
        value = loss(logits, torch.full_like(labels, 255), features)
        value.backward()
        assert value == 0
        assert (logits.grad == 0).all()

    def test_reports_its_parts(self, loss, batch):
        if isinstance(loss, PALSLoss):
            loss = PALSLoss(adaptive_beta=False)  # with one beta for all pixels the parts add up
        value, parts = loss.compute(*batch)
        assert value == loss(*batch)
        weight = getattr(loss, "beta", getattr(loss, "smoothing", 0))
        soft = parts.get("aggregated", parts.get("uniform", 0))
        mixed = (1 - weight) * parts.get("one_hot", 0) + weight * soft + parts.get("focal", 0) + parts.get("margin", 0)
        torch.testing.assert_close(mixed, value)
        assert not any(part.requires_grad for part in parts.values())

    def test_class_weights(self, loss, batch):
        """Weights of 1 change nothing; a class of weight 0 has no term."""
        logits, labels, features = batch
        own = {"margin": loss.margin} if isinstance(loss, MarginLoss) else {}
        even, without = (type(loss)(class_weights=w, **own) for w in ([1.0] * 4, [0.0, 1.0, 1.0, 1.0]))
        torch.testing.assert_close(even(logits, labels, features), loss(logits, labels, features))
        void = labels.masked_fill(labels == 0, 255)
        torch.testing.assert_close(without(logits, labels, features), loss(logits, void, features))
        assert without.count(labels).tolist() == loss.count(void).tolist()

    @pytest.mark.parametrize("weights", [[-1.0, 1, 1, 1], [float("nan"), 1, 1, 1], [[1.0, 1, 1, 1]]])
    def test_refuses_class_weights(self, loss, weights):
        with pytest.raises(ValueError, match="class_weights must be one number of at least 0 for each class"):
            type(loss)(class_weights=weights)

    def test_refuses_shapes_that_do_not_fit(self, loss, batch):
        logits, labels, features = batch
        with pytest.raises(ValueError, match="logits and labels must be"):
            loss(logits, labels[:1], features)
        own = {"margin": loss.margin} if isinstance(loss, MarginLoss) else {}
        with pytest.raises(ValueError, match="class_weights must be 4 numbers"):
            type(loss)(class_weights=[1.0, 1.0], **own)(logits, labels, features)

    def test_says_its_settings(self, loss):
        assert "ignore_index=255" in repr(loss)


def test_cross_entropy_is_torch(batch):
    logits, labels, _ = batch
    up = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(CrossEntropyLoss()(logits, labels), F.cross_entropy(up, labels, ignore_index=255))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_torch(batch, smoothing):
    logits, labels, _ = batch
    up = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    # torch smooths over all pixels it counts, so void ones are taken out by hand.
    keep = labels != 255
    expected = F.cross_entropy(up.movedim(1, -1)[keep], labels[keep], label_smoothing=smoothing)
    torch.testing.assert_close(LabelSmoothingLoss(smoothing)(logits, labels), expected)


def pixels_of(logits, labels):
    """The upsampled logits and the labels of the labelled pixels, `(n, C)` and `(n,)`, with torch's own operations."""
    up = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False).movedim(1, -1)
    keep = labels != 255
    return up[keep], labels[keep]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_focal_loss_is_the_formula(batch, gamma):
    logits, labels, _ = batch
    logits.requires_grad_()
    z, y = pixels_of(logits.double(), labels)
    p = z.softmax(dim=1)[range(len(y)), y]
    expected = (-((1 - p) ** gamma) * p.log()).mean()
    loss = FocalLoss(gamma)(logits, labels)
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


@pytest.mark.parametrize(("margin", "weight"), [(0.0, 0.3), (3.0, 0.1), (100.0, 0.1)])
def test_margin_loss_is_the_formula(batch, margin, weight):
    logits, labels, _ = batch
    logits.requires_grad_()
    z, y = pixels_of(logits.double(), labels)
    excess = (z.max(dim=1, keepdim=True).values - z - margin).clamp(min=0)
    expected = F.cross_entropy(z, y) + weight * excess.mean()
    loss, parts = MarginLoss(margin, weight).compute(logits, labels)
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))
    assert bool(parts["margin"] > 0) is (margin < 100)


def test_focal_loss_of_pixels_that_are_certain():
    """Neither a probability that rounds to 1 nor one that rounds to 0 ends in a gradient that is not finite."""
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).requires_grad_()
    for label in (0, 1):
        for gamma in (0.0, 0.5, 3.0):
            (gradient,) = torch.autograd.grad(FocalLoss(gamma)(logits, torch.tensor([[[label]]])), logits)
            assert gradient.isfinite().all()


def test_losses_of_pixels_are_the_same_in_many_tiles(batch, monkeypatch):
    logits, labels, _ = batch
    logits.requires_grad_()
    whole = MarginLoss(1.0)(logits, labels)
    (gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr("pals_hf.functional.fused._TILE", dict.fromkeys(("cpu", "cuda"), (200, 7)))
    tiled = MarginLoss(1.0)(logits, labels)
    torch.testing.assert_close(tiled, whole)
    torch.testing.assert_close(torch.autograd.grad(tiled, logits)[0], gradient)
    with torch.no_grad():
        torch.testing.assert_close(MarginLoss(1.0)(logits, labels), whole)


def test_a_loss_of_pixels_in_half_precision(batch):
    logits, labels, _ = batch
    logits = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = mean_over_pixels(
            lambda z, y: {"ce": F.cross_entropy(z, y, reduction="none")}, logits, labels, num_items=7
        )
    value.backward()
    assert (value.dtype, logits.grad.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: FocalLoss(-1.0), "gamma must be at least 0, got -1.0"),
        (lambda: MarginLoss(-1.0), "margin and weight must be at least 0, got -1.0 and 0.1"),
        (lambda: MarginLoss(weight=float("nan")), "margin and weight must be at least 0, got 10.0 and nan"),
    ],
)
def test_refuses_settings_out_of_range(build, problem):
    with pytest.raises(ValueError, match=problem):
        build()


class TestPALS:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_equals_the_formula(self, batch, preset):
        logits, labels, features = batch
        settings = PRESETS[preset]
        p = (logits.double() / settings["affinity"].temperature).softmax(dim=1)
        q = reference.aggregate(features, p, settings["affinity"])
        expected = reference.soft_label_loss(logits, labels, q, settings["beta"], adaptive=settings["adaptive_beta"])
        torch.testing.assert_close(
            PALSLoss(**settings)(logits, labels, features).double(), expected, rtol=1e-5, atol=0
        )

    def test_gradient_is_that_with_q_detached(self, batch):
        logits, labels, features = batch
        logits.requires_grad_(), features.requires_grad_()
        loss = PALSLoss(beta=0.5)
        (gradient,) = torch.autograd.grad(loss(logits, labels, features), logits)
        q = reference.aggregate(features, logits.softmax(dim=1), loss.affinity).detach()
        (expected,) = torch.autograd.grad(reference.soft_label_loss(logits, labels, q, 0.5, adaptive=True), logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
        loss(logits, labels, features).backward()
        assert features.grad is None

    def test_settings_reach_the_aggregation_and_the_loss(self, batch):
        logits, labels, features = batch
        affinity = Affinity(
            tau=0.5, keys=12, pairs="same_class", unlabeled_keys=False, steps=2, weight=0.7, temperature=2.0
        )
        constant = PALSLoss(0.4, affinity, distill_unlabeled=True, adaptive_beta=False)
        q = reference.aggregate(features, (logits.double() / 2.0).softmax(dim=1), affinity, labels, stride=2)
        expected = reference.soft_label_loss(logits, labels, q, 0.4, distill_unlabeled=True)
        value, parts = constant.compute(logits, labels, features)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(0.6 * parts["one_hot"] + 0.4 * (parts["aggregated"] + parts["unlabeled"]), value)
        expected = reference.soft_label_loss(logits, labels, q, 0.4, adaptive=True)
        value = PALSLoss(0.4, affinity)(logits, labels, features)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)

    def test_beta_is_an_argument_too(self, batch):
        assert PALSLoss(beta=0.5)(*batch, beta=0.2) == PALSLoss(beta=0.2)(*batch)

    def test_resize_acts_on_logits_and_on_q(self, batch):
        """Positions are compared on the classifier's grid; the loss is taken behind the head's own interpolation."""
        logits, labels, features = batch
        double = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        loss = PALSLoss()
        expected = loss(double(logits), labels, aggregated=double(loss.aggregate(logits, features)))
        assert loss(logits, labels, features, resize=double) == expected
        assert loss(logits, labels, features) != expected

    def test_a_q_of_ones_own(self, batch):
        logits, labels, _ = batch
        loss, q = PALSLoss(), torch.softmax(torch.randn(2, 4, 6, 8), dim=1)
        expected = reference.soft_label_loss(logits, labels, q, loss.beta, adaptive=True)
        torch.testing.assert_close(loss(logits, labels, aggregated=q).double(), expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"affinity": Affinity(pairs="same_class", unlabeled_keys=False)},
            {"affinity": Affinity(include_self=False)},
            {"distill_unlabeled": True},
        ],
    )
    def test_every_option_with_an_unlabelled_batch(self, batch, options):
        logits, labels, features = batch
        logits.requires_grad_()
        value = PALSLoss(**options)(logits, torch.full_like(labels, 255), features)
        value.backward()
        assert logits.grad.isfinite().all()
        assert (value > 0) == ("distill_unlabeled" in options)

    def test_without_features_the_logits_serve(self, batch):
        logits, labels, _ = batch
        assert PALSLoss()(logits, labels) == PALSLoss()(logits, labels, logits)

    def test_beta_zero_is_cross_entropy(self, batch):
        torch.testing.assert_close(PALSLoss(beta=0)(*batch), CrossEntropyLoss()(*batch), rtol=0, atol=1e-6)

    def test_differs_from_cross_entropy(self, batch):
        logits, labels, features = batch
        believed = F.interpolate(logits, size=labels.shape[1:], mode="bilinear").argmax(dim=1)
        for loss, truth in ((PALSLoss(adaptive_beta=False), labels), (PALSLoss(), believed)):
            assert abs(loss(logits, truth, features) - CrossEntropyLoss()(logits, truth)) > 1e-2

    def test_plain_self_distillation_teaches_nothing(self, batch):
        """With one beta, at temperature 1, on one grid, it scales cross-entropy's gradient, which Adam undoes."""
        logits, _, features = batch
        logits, labels = logits.requires_grad_(), torch.randint(0, 4, (2, 6, 8))
        gradients = {}
        for name, loss in {
            "ce": CrossEntropyLoss(),
            "self-distillation": PALSLoss(0.3, Affinity(weight=0.0), adaptive_beta=False),
            "average": PALSLoss(0.3, Affinity(tau=0.3), adaptive_beta=False),
        }.items():
            (gradients[name],) = torch.autograd.grad(loss(logits, labels, features), logits)
        torch.testing.assert_close(gradients["self-distillation"], 0.7 * gradients["ce"])
        assert (gradients["average"] - gradients["self-distillation"]).norm() > 0.1 * gradients[
            "self-distillation"
        ].norm()

    def test_entropy_of_q(self, batch):
        logits, labels, features = batch
        _, parts = PALSLoss(affinity=Affinity(temperature=1e6)).compute(logits, labels, features)
        torch.testing.assert_close(parts["entropy"], torch.tensor(4.0).log())

    def test_trains_a_plain_torch_model(self):
        model = torch.nn.Conv2d(3, 4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        images, labels = torch.randn(2, 3, 8, 8), torch.zeros(2, 16, 16, dtype=torch.long)
        loss, values = PALSLoss(), []
        for _ in range(20):
            value = loss(model(images), labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[-1] < values[0]

    @pytest.mark.parametrize("beta", [-0.1, 1.1])
    def test_refuses(self, beta):
        with pytest.raises(ValueError, match="beta must lie in"):
            PALSLoss(beta)


def test_label_smoothing_refuses():
    with pytest.raises(ValueError, match="smoothing"):
        LabelSmoothingLoss(1.1)


def test_uniform_distribution_is_not_rounded():
    """In bfloat16 1/19 is not, and the shares of all classes would sum to 1.002."""
    logits, labels = torch.randn(2, 19, 6, 8).bfloat16(), torch.randint(0, 19, (2, 12, 16))
    loss = LabelSmoothingLoss(smoothing=1.0)
    assert loss(logits, labels) == loss(logits.float(), labels)
