import subprocess
import sys

import pytest
import reference
import torch
import torch.nn.functional as F

from pals_hf.functional import aggregate_probabilities, entropy, soft_label_cross_entropy, upsample


def maps(channels, grid=(6, 9), batch=2, seed=0):
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(seed))


def random_labels(size=(24, 36), classes=3, void_share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (2, *size), generator=generator)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < void_share, 255)


class TestAggregateProbabilities:
    # More classes than features, fewer, and a width that is no multiple of the kernel's alignment.
    @pytest.mark.parametrize(("features", "classes"), [(8, 3), (4, 21), (13, 13)])
    @pytest.mark.parametrize("tau", [0.05, 0.3, 5.0])
    def test_equals_the_materialised_matrix(self, features, classes, tau):
        f, p = maps(features), maps(classes, seed=1).softmax(dim=1)
        expected = reference.aggregate(f, p, tau)
        torch.testing.assert_close(aggregate_probabilities(f, p, tau=tau).double(), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
    def test_half_precision_features(self, dtype, error):
        f, p = maps(16, (12, 20)), maps(5, (12, 20), seed=1).softmax(dim=1)
        q = aggregate_probabilities(f.to(dtype), p, tau=0.3)
        assert q.dtype == torch.float32
        expected = reference.aggregate(f, p, 0.3)
        assert ((q.double() - expected).norm() / expected.norm()) < error

    def test_each_cell_is_a_distribution(self):
        q = aggregate_probabilities(maps(8).bfloat16(), maps(5, seed=1).softmax(dim=1), tau=0.1)
        torch.testing.assert_close(q.sum(dim=1), torch.ones(2, 6, 9))
        assert (q >= 0).all()

    def test_limits_of_tau(self):
        f, p = maps(8), maps(3, seed=1).softmax(dim=1)
        torch.testing.assert_close(aggregate_probabilities(f, p, tau=1e-3), p, rtol=1e-4, atol=1e-5)
        mean = p.mean(dim=(2, 3), keepdim=True).expand_as(p)
        torch.testing.assert_close(aggregate_probabilities(f, p, tau=1e5), mean, rtol=1e-4, atol=1e-5)

    def test_scale_of_the_features_does_not_matter(self):
        f, p = maps(8), maps(3, seed=1).softmax(dim=1)
        torch.testing.assert_close(
            aggregate_probabilities(f * 1e4, p, tau=0.3), aggregate_probabilities(f, p, tau=0.3)
        )
        half = (f * 1e3).half()  # their squares overflow float16
        assert aggregate_probabilities(half, p, tau=0.3).isfinite().all()

    def test_images_do_not_mix(self):
        f, p = maps(8), maps(3, seed=1).softmax(dim=1)
        alone = aggregate_probabilities(f[:1], p[:1], tau=0.3)
        torch.testing.assert_close(aggregate_probabilities(f, p, tau=0.3)[:1], alone)

    def test_a_zero_feature_is_no_nan(self):
        p = maps(3, seed=1).softmax(dim=1)
        assert aggregate_probabilities(torch.zeros(2, 8, 6, 9), p, tau=0.3).isfinite().all()

    @pytest.mark.parametrize(
        ("features", "probabilities", "tau", "message"),
        [
            (maps(8)[0], maps(3), 0.3, "must be"),
            (maps(8, (5, 9)), maps(3), 0.3, "share batch size and grid"),
            (maps(8, batch=1), maps(3), 0.3, "share batch size and grid"),
            (maps(8), maps(3), 0.0, "tau must be positive"),
        ],
    )
    def test_refuses(self, features, probabilities, tau, message):
        with pytest.raises(ValueError, match=message):
            aggregate_probabilities(features, probabilities, tau=tau)

    def test_memory_is_linear_in_the_pixels(self):
        """N = 16 384: the matrix alone is 1 GiB. In a process of its own, whose peak is its own."""
        script = (
            "import resource, torch\n"
            "from pals_hf.functional import aggregate_probabilities\n"
            "f, p = torch.randn(1, 16, 128, 128), torch.randn(1, 3, 128, 128).softmax(1)\n"
            "aggregate_probabilities(f[..., :8, :8], p[..., :8, :8], tau=0.3)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "aggregate_probabilities(f, p, tau=0.3)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )
        extra = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
        assert extra < 200 * 1024  # KiB


class TestSoftLabelCrossEntropy:
    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("size", [(6, 9), (24, 36), (25, 31)])
    def test_equals_the_formula(self, beta, size):
        logits, aggregated = maps(3) * 3, maps(3, seed=1).softmax(dim=1)
        labels = random_labels(size)
        expected = reference.soft_label_loss(logits, labels, aggregated, beta)
        loss = soft_label_cross_entropy(logits, labels, aggregated, beta)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("size", [(24, 36), (25, 31)])
    def test_beta_zero_is_cross_entropy(self, size):
        logits, labels = (maps(3) * 3).requires_grad_(), random_labels(size)
        up = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        expected = F.cross_entropy(up, labels, ignore_index=255)
        loss = soft_label_cross_entropy(logits, labels)
        assert abs((loss - expected).item()) < 1e-6
        (gradient,), (expected_gradient,) = (torch.autograd.grad(x, logits) for x in (loss, expected))
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)

    def test_no_gradient_through_the_aggregated_distribution(self):
        logits, aggregated = maps(3).requires_grad_(), maps(3, seed=1).softmax(dim=1).requires_grad_()
        soft_label_cross_entropy(logits, random_labels(), aggregated, 0.5).backward()
        assert aggregated.grad is None
        assert logits.grad.norm() > 0

    def test_gradient_against_finite_differences(self):
        logits, aggregated = maps(3, (3, 4)).double(), maps(3, (3, 4), seed=1).softmax(dim=1)
        labels, beta, step = random_labels((7, 9)), 0.4, 1e-3
        logits32 = logits.float().requires_grad_()
        soft_label_cross_entropy(logits32, labels, aggregated, beta).backward()
        for index in [(0, 0, 0, 0), (1, 2, 2, 3), (0, 1, 1, 2)]:
            nudge = torch.zeros_like(logits)
            nudge[index] = step
            ahead, behind = (
                reference.soft_label_loss(logits + sign * nudge, labels, aggregated, beta) for sign in (1, -1)
            )
            assert float(logits32.grad[index]) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-3, abs=1e-7)

    def test_values_under_void_labels_change_nothing(self):
        """A void region wide enough that interpolation does not reach its middle from labelled pixels."""
        labels = random_labels((24, 36), void_share=0)
        labels[:, :12] = 255
        logits, aggregated = maps(3), maps(3, seed=1).softmax(dim=1)
        changed, changed_q = logits.clone(), aggregated.clone()
        changed[:, :, :2] = 1e3
        changed_q[:, :, :2] = changed_q[:, :, :2].flip(1)
        losses = [soft_label_cross_entropy(z, labels, q, 0.5) for z, q in ((logits, aggregated), (changed, changed_q))]
        assert losses[0] == losses[1]

    def test_all_void_is_zero_with_finite_gradients(self):
        logits = maps(3).requires_grad_()
        loss = soft_label_cross_entropy(logits, torch.full((2, 24, 36), 255), maps(3).softmax(dim=1), 0.5)
        loss.backward()
        assert loss == 0
        assert (logits.grad == 0).all()

    def test_infinite_values_under_void_stay_out(self):
        labels = random_labels((6, 9), void_share=0)
        labels[0, 0, 0] = 255
        logits = maps(3)
        logits[0, 0, 0, 0] = float("-inf")
        assert soft_label_cross_entropy(logits, labels, maps(3, seed=1).softmax(dim=1), 0.5).isfinite()

    def test_num_items_makes_parts_add_up(self):
        logits, labels, aggregated = maps(3), random_labels(), maps(3, seed=1).softmax(dim=1)
        labels[0, :12] = 255
        whole = soft_label_cross_entropy(logits, labels, aggregated, 0.3)
        count = (labels != 255).sum()
        parts = [
            soft_label_cross_entropy(logits[i : i + 1], labels[i : i + 1], aggregated[i : i + 1], 0.3, num_items=count)
            for i in range(2)
        ]
        torch.testing.assert_close(sum(parts), whole)

    def test_parts_mix_to_the_loss(self):
        loss, parts = soft_label_cross_entropy(
            maps(3), random_labels(), maps(3, seed=1).softmax(dim=1), 0.3, return_parts=True
        )
        torch.testing.assert_close(0.7 * parts["one_hot"] + 0.3 * parts["aggregated"], loss)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_computed_in_float32(self, dtype):
        logits, labels = maps(3).to(dtype), random_labels()
        loss = soft_label_cross_entropy(logits, labels)
        assert loss.dtype == torch.float32
        assert loss == soft_label_cross_entropy(logits.float(), labels)

    def test_float32_under_autocast(self):
        logits, labels, aggregated = maps(3), random_labels(), maps(3, seed=1).softmax(dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = soft_label_cross_entropy(logits, labels, aggregated, 0.5)
        assert loss == soft_label_cross_entropy(logits, labels, aggregated, 0.5)

    def test_another_ignore_index(self):
        logits, labels = maps(3), random_labels()
        expected = soft_label_cross_entropy(logits, labels)
        other = labels.masked_fill(labels == 255, -100)
        assert soft_label_cross_entropy(logits, other, ignore_index=-100) == expected

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"beta": 1.5}, "beta must lie in"),
            ({"beta": -0.1}, "beta must lie in"),
            ({"beta": 0.5}, "aggregated distribution is needed"),
            ({"labels": random_labels()[0]}, "must be"),
            ({"aggregated": maps(4)}, "shape of logits"),
        ],
    )
    def test_refuses(self, changes, message):
        arguments = {"logits": maps(3), "labels": random_labels(), **changes}
        with pytest.raises(ValueError, match=message):
            soft_label_cross_entropy(**arguments)


def test_upsample_is_what_image_processors_do():
    logits = maps(3)
    expected = F.interpolate(logits, size=(25, 31), mode="bilinear", align_corners=False)
    assert torch.equal(upsample(logits, (25, 31)), expected)
    assert upsample(logits, (6, 9)) is logits


def test_entropy():
    p = torch.tensor([[[1.0, 0.5]], [[0.0, 0.5]]]).unsqueeze(0)
    torch.testing.assert_close(entropy(p), torch.tensor([[[0.0, 0.693147]]]))
