import subprocess
import sys

import pytest
import reference
import torch
import torch.nn.functional as F

from pals_hf.functional import (
    PADDING_INDEX,
    Affinity,
    aggregate_probabilities,
    aggregation,
    count_pixels,
    entropy,
    pool_labels,
    soft_label_cross_entropy,
    stride_of_keys,
    upsample,
    upsample_argmax,
)


def maps(channels, grid=(6, 9), batch=2, seed=0):
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(seed))


def random_labels(size=(24, 36), classes=3, void_share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (2, *size), generator=generator)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < void_share, 255)


def patchy_labels(size=(24, 36)):
    """Stripes of three classes and a void corner, coarse enough that cells of 4 x 4 pixels are of one kind."""
    labels = (torch.arange(size[1]) // 7 % 3).expand(2, *size).clone()
    labels[:, : size[0] // 3, : size[1] // 2] = 255
    labels[1] = labels[1].flip(0)
    return labels


class TestAggregateProbabilities:
    # More classes than features, fewer, and a width that is no multiple of the kernel's alignment.
    @pytest.mark.parametrize(("features", "classes"), [(8, 3), (4, 21), (13, 13)])
    @pytest.mark.parametrize("tau", [0.05, 0.3, 5.0])
    def test_equals_the_materialised_matrix(self, features, classes, tau):
        f, p, affinity = maps(features), maps(classes, seed=1).softmax(dim=1), Affinity(tau=tau)
        expected = reference.aggregate(f, p, affinity)
        torch.testing.assert_close(aggregate_probabilities(f, p, affinity).double(), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("keys", [None, 15])
    @pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
    def test_half_precision_features(self, dtype, error, keys):
        f, p, affinity = maps(16, (12, 20)), maps(5, (12, 20), seed=1).softmax(dim=1), Affinity(tau=0.3, keys=keys)
        q = aggregate_probabilities(f.to(dtype), p, affinity)
        assert q.dtype == torch.float32
        expected = reference.aggregate(f, p, affinity, stride=4 if keys else 1)
        assert ((q.double() - expected).norm() / expected.norm()) < error

    @pytest.mark.parametrize("keys", [None, 6])
    def test_each_position_has_a_distribution(self, keys):
        q = aggregate_probabilities(maps(8).bfloat16(), maps(5, seed=1).softmax(dim=1), Affinity(tau=0.1, keys=keys))
        torch.testing.assert_close(q.sum(dim=1), torch.ones(2, 6, 9))
        assert (q >= 0).all()

    def test_limits_of_tau(self):
        f, p = maps(8), maps(3, seed=1).softmax(dim=1)
        torch.testing.assert_close(aggregate_probabilities(f, p, Affinity(tau=1e-3)), p, rtol=1e-4, atol=1e-5)
        mean = p.mean(dim=(2, 3), keepdim=True).expand_as(p)
        torch.testing.assert_close(aggregate_probabilities(f, p, Affinity(tau=1e5)), mean, rtol=1e-4, atol=1e-5)

    def test_scale_of_the_features_does_not_matter(self):
        f, p, affinity = maps(8), maps(3, seed=1).softmax(dim=1), Affinity(tau=0.3)
        torch.testing.assert_close(
            aggregate_probabilities(f * 1e4, p, affinity), aggregate_probabilities(f, p, affinity)
        )
        half = (f * 1e3).half()  # their squares overflow float16
        assert aggregate_probabilities(half, p, affinity).isfinite().all()

    def test_images_do_not_mix(self):
        f, p, affinity = maps(8), maps(3, seed=1).softmax(dim=1), Affinity(tau=0.3)
        alone = aggregate_probabilities(f[:1], p[:1], affinity)
        torch.testing.assert_close(aggregate_probabilities(f, p, affinity)[:1], alone)

    def test_with_weight_0_nothing_is_compared(self, monkeypatch):
        f, p = maps(8), maps(3, seed=1).softmax(dim=1)
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("compared positions"))
        for keys in (None, 6):
            assert torch.equal(aggregate_probabilities(f, p, Affinity(weight=0.0, keys=keys)), p)
        with pytest.raises(pytest.fail.Exception, match="compared positions"):
            aggregate_probabilities(f, p)

    def test_a_zero_feature_is_no_nan(self):
        p = maps(3, seed=1).softmax(dim=1)
        assert aggregate_probabilities(torch.zeros(2, 8, 6, 9), p).isfinite().all()

    @pytest.mark.parametrize(
        ("features", "probabilities", "affinity", "labels", "message"),
        [
            (maps(8)[0], maps(3), Affinity(), None, "must be"),
            (maps(8, (5, 9)), maps(3), Affinity(), None, "share batch size and grid"),
            (maps(8, batch=1), maps(3), Affinity(), None, "share batch size and grid"),
            (maps(8), maps(3), Affinity(pairs="same_class"), None, "needs labels"),
            (maps(8), maps(3), Affinity(unlabeled_keys=False), patchy_labels()[:1], "needs labels"),
        ],
    )
    def test_refuses(self, features, probabilities, affinity, labels, message):
        with pytest.raises(ValueError, match=message):
            aggregate_probabilities(features, probabilities, affinity, labels=labels)

    # The 6 x 9 positions in blocks of 2 x 2 (15 keys), of 3 x 3 (6 keys), and of 5 x 5 (4 keys).
    @pytest.mark.parametrize(("keys", "stride"), [(None, 1), (15, 2), (6, 3), (4, 5)])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"pairs": "same_class"},
            {"pairs": "same_class", "unlabeled_keys": False},
            {"unlabeled_keys": False},
            {"include_self": False},
            {"include_self": False, "pairs": "same_class"},
            {"include_self": False, "pairs": "same_class", "unlabeled_keys": False},
            {"steps": 3, "weight": 0.6},
            {"steps": 2, "include_self": False},
            {"steps": 2, "unlabeled_keys": False},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("tau", [0.3, 1.0])
    def test_settings_equal_the_materialised_matrix(self, settings, keys, stride, tau):
        f, p, labels = maps(8), maps(3, seed=1).softmax(dim=1), patchy_labels()
        affinity = Affinity(tau=tau, keys=keys, **settings)
        q = aggregate_probabilities(f, p, affinity, labels=labels)
        expected = reference.aggregate(f, p, affinity, labels, stride)
        torch.testing.assert_close(q.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q.sum(dim=1), torch.ones(2, 6, 9))
        if affinity != Affinity(tau=tau, keys=None):  # the setting does something
            assert (q - aggregate_probabilities(f, p, Affinity(tau=tau, keys=None))).abs().max() > 1e-3

    @pytest.mark.parametrize("settings", [{"pairs": "same_class"}, {"include_self": False}, {"unlabeled_keys": False}])
    def test_settings_in_bfloat16(self, settings):
        f, p = maps(16, (12, 18)), maps(5, (12, 18), seed=1).softmax(dim=1)
        affinity = Affinity(tau=0.3, keys=None, **settings)
        q = aggregate_probabilities(f.bfloat16(), p, affinity, labels=patchy_labels())
        expected = reference.aggregate(f, p, affinity, patchy_labels())
        assert (q.double() - expected).norm() / expected.norm() < 1e-2

    def test_a_position_that_is_alone_keeps_its_own_distribution(self):
        labels = torch.zeros(1, 6, 9, dtype=torch.int64)
        labels[0, 2, 3] = 1
        f, p = maps(8, batch=1), maps(3, seed=1, batch=1).softmax(dim=1)
        affinity = Affinity(tau=0.3, pairs="same_class", include_self=False)
        q = aggregate_probabilities(f, p, affinity, labels=labels)
        torch.testing.assert_close(q[..., 2, 3], p[..., 2, 3])
        assert (q - p).abs().max() > 0.01

    @pytest.mark.parametrize("include_self", [True, False])
    def test_a_class_that_is_in_no_block_keeps_its_own_distribution(self, include_self):
        """The majority of every block is another class: no key of its own is left."""
        labels = torch.zeros(1, 6, 9, dtype=torch.int64)
        labels[0, 2, 3] = 1
        f, p = maps(8, batch=1), maps(3, seed=1, batch=1).softmax(dim=1)
        affinity = Affinity(tau=0.3, pairs="same_class", keys=6, include_self=include_self)
        q = aggregate_probabilities(f, p, affinity, labels=labels)
        torch.testing.assert_close(q[..., 2, 3], p[..., 2, 3])
        expected = reference.aggregate(f, p, affinity, labels, stride=3)
        torch.testing.assert_close(q.double(), expected, rtol=1e-4, atol=1e-5)

    def test_no_label_at_all_without_unlabeled_keys(self):
        f, p = maps(8), maps(3, seed=1).softmax(dim=1)
        none = torch.full((2, 24, 36), 255)
        q = aggregate_probabilities(f, p, Affinity(tau=0.3, unlabeled_keys=False), labels=none)
        torch.testing.assert_close(q, p)

    def test_without_self_half_precision_features_lose_nothing(self):
        """Where the own weight dominates, the weight of the others is smaller than bfloat16 can tell."""
        f, p = maps(32).bfloat16(), maps(5, seed=1).softmax(dim=1)
        affinity = Affinity(tau=0.15, include_self=False)
        expected = reference.aggregate(f.float(), p, affinity)
        torch.testing.assert_close(aggregate_probabilities(f, p, affinity).double(), expected, rtol=0.05, atol=0.01)

    def test_unlabelled_positions_stay_out_without_unlabeled_keys(self):
        f, p, labels = maps(8), maps(3, seed=1).softmax(dim=1), patchy_labels()
        unlabelled, affinity = pool_labels(labels, (6, 9), 3) == 255, Affinity(tau=0.3, unlabeled_keys=False)
        assert unlabelled.any()
        changed = torch.where(unlabelled[:, None], p.flip(1), p)
        q, q_changed = (aggregate_probabilities(f, x, affinity, labels=labels) for x in (p, changed))
        torch.testing.assert_close(q, q_changed)

    @pytest.mark.parametrize("settings", [{"keys": None}, {"keys": 15}, {"include_self": False}], ids=str)
    def test_queries_in_several_parts(self, settings, monkeypatch):
        f, p, affinity = maps(8), maps(3, seed=1).softmax(dim=1), Affinity(tau=0.3, **settings)
        whole = aggregate_probabilities(f, p, affinity)
        monkeypatch.setitem(aggregation._QUERIES_AT_ONCE, "cpu", 7)  # of 54
        monkeypatch.setitem(aggregation._SCORES_AT_ONCE, "cpu", 7 * 15)
        torch.testing.assert_close(aggregate_probabilities(f, p, affinity), whole)

    def test_keys_that_cover_the_grid_are_all_pairs(self):
        f, p = maps(8), maps(3, seed=1).softmax(dim=1)
        exact = aggregate_probabilities(f, p, Affinity(keys=None))
        assert torch.equal(aggregate_probabilities(f, p, Affinity(keys=54)), exact)
        assert not torch.equal(aggregate_probabilities(f, p, Affinity(keys=53)), exact)

    @pytest.mark.parametrize("settings", ["keys=None", "keys=None, pairs='same_class', include_self=False", "steps=2"])
    def test_memory_is_linear_in_the_pixels(self, settings):
        """N = 16 384: the matrix alone is 1 GiB. In a process of its own, whose peak is its own."""
        script = (
            "import resource, torch\n"
            "from pals_hf.functional import Affinity, aggregate_probabilities\n"
            "f, p = torch.randn(1, 16, 128, 128), torch.randn(1, 3, 128, 128).softmax(1)\n"
            "labels = torch.randint(0, 3, (1, 512, 512))\n"
            "aggregate_probabilities(f[..., :8, :8], p[..., :8, :8])\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"aggregate_probabilities(f, p, Affinity({settings}), labels=labels)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )
        extra = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
        assert extra < 200 * 1024  # KiB


class TestAffinity:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"tau": 0.0}, "tau must be positive, got 0.0"),
            ({"tau": float("nan")}, "tau must be positive, got nan"),
            ({"temperature": -1.0}, "temperature must be positive"),
            ({"pairs": "some"}, "pairs must be one of all, same_class, got 'some'"),
            ({"source": "image"}, "source must be one of classifier_input, before_dropout"),
            ({"keys": 0}, "keys must be a whole number of at least 1, got 0"),
            ({"keys": 2.5}, "keys must be a whole number"),
            ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
            ({"weight": 1.2}, "weight must lie in"),
            ({"include_self": "false"}, "include_self must be true or false, got 'false'"),
            ({"taus": 1.0}, "there is no setting 'taus'; the settings are tau, keys, "),
            ({"tau": "small"}, "holds a value of the wrong type"),
        ],
    )
    def test_refuses(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Affinity().replace(settings)

    def test_replace(self):
        assert Affinity().replace({"tau": 0.5, "keys": None}) == Affinity(tau=0.5, keys=None)
        assert Affinity().replace({}) == Affinity()

    @pytest.mark.parametrize(("keys", "stride"), [(None, 1), (54, 1), (53, 2), (15, 2), (14, 3), (1, 9)])
    def test_stride_of_keys(self, keys, stride):
        assert stride_of_keys((6, 9), keys) == stride


class TestPoolLabels:
    @pytest.mark.parametrize("grid", [(6, 9), (24, 36), (5, 7), (1, 1)])
    def test_is_the_majority_of_the_labelled_pixels(self, grid):
        labels = random_labels(void_share=0.6)
        assert torch.equal(pool_labels(labels, grid, 3), reference.pool_labels(labels, grid, 3))

    def test_blocks_of_positions(self):
        """Grid 9 at stride 2: five blocks of 2, 2, 2, 2 and 1 cells, not five even parts."""
        labels = random_labels(void_share=0.6)
        expected = reference.pool_labels(labels, (6, 9), 3, stride=2)
        assert expected.shape == (2, 3, 5)
        assert torch.equal(pool_labels(labels, (6, 9), 3, stride=2), expected)
        assert not torch.equal(expected, pool_labels(labels, (3, 5), 3))

    def test_padding_is_void(self):
        labels = torch.tensor([[[PADDING_INDEX, PADDING_INDEX, 2, PADDING_INDEX]]])
        assert pool_labels(labels, (1, 2), 3).tolist() == [[[255, 2]]]

    def test_on_a_grid_finer_than_the_labels(self):
        assert pool_labels(torch.tensor([[[0, 1]]]), (2, 4), 2).tolist() == [[[0, 0, 1, 1]] * 2]


FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])


def class_weight_inputs():
    labels = torch.randint(0, 4, (2, 17, 23))
    labels[0, :5] = 255
    return 3 * torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6).softmax(dim=1), labels


class TestSoftLabelCrossEntropy:
    @FUSED
    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("size", [(6, 9), (24, 36), (25, 31), (5, 4)])
    @pytest.mark.parametrize(
        ("distill_unlabeled", "adaptive"), [(False, False), (True, False), (False, True), (True, True)]
    )
    def test_equals_the_formula(self, beta, size, fused, distill_unlabeled, adaptive):
        logits, aggregated = maps(3) * 3, maps(3, seed=1).softmax(dim=1)
        labels = random_labels(size)
        labels[:, :, -1] = PADDING_INDEX
        expected = reference.soft_label_loss(
            logits, labels, aggregated, beta, distill_unlabeled=distill_unlabeled, adaptive=adaptive
        )
        loss = soft_label_cross_entropy(
            logits, labels, aggregated, beta, fused=fused, distill_unlabeled=distill_unlabeled, adaptive_beta=adaptive
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("classes", [2, 19])
    @pytest.mark.parametrize("size", [(256, 384), (250, 301), (64, 96), (40, 50), (1, 1)])
    @pytest.mark.parametrize(("beta", "adaptive"), [(None, False), (0.3, False), (0.3, True)])
    def test_fused_equals_plain(self, classes, size, beta, adaptive):
        """Integer and fractional scales up and down, over several tiles, with gradients."""
        logits = (maps(classes, (64, 96)) * 3).requires_grad_()
        labels = random_labels(size, classes)
        labels[:, -3:] = PADDING_INDEX if size[0] > 3 else 0
        arguments = {} if beta is None else {"beta": beta, "distill_unlabeled": True, "adaptive_beta": adaptive}
        if beta is not None:
            arguments["aggregated"] = maps(classes, (64, 96), seed=1).softmax(dim=1)
        results = []
        for fused in (True, False):
            loss, parts = soft_label_cross_entropy(logits, labels, return_parts=True, fused=fused, **arguments)
            results.append((loss, *parts.values(), torch.autograd.grad(loss, logits)[0]))
            assert parts.keys() == ({"one_hot"} if beta is None else {"one_hot", "aggregated", "unlabeled"})
        *values, gradient = results[0]
        *plain_values, plain_gradient = results[1]
        torch.testing.assert_close(values, plain_values, rtol=2e-6, atol=0)
        assert (gradient - plain_gradient).norm() <= 1e-6 * plain_gradient.norm()

    def test_adaptive_beta_leaves_labels_that_q_excludes(self):
        """Then it is cross-entropy, whatever beta."""
        logits, labels = maps(3), random_labels()
        labels[labels == 2] = 1
        never = torch.zeros_like(logits)
        never[:, 2] = 1.0
        expected = soft_label_cross_entropy(logits, labels)
        adaptive, constant = (
            soft_label_cross_entropy(logits, labels, never, 0.9, adaptive_beta=is_adaptive)
            for is_adaptive in (True, False)
        )
        torch.testing.assert_close(adaptive, expected)
        assert not torch.isclose(constant, expected, rtol=1e-3)

    def test_adaptive_beta_is_focal_with_ones_own_prediction(self):
        """Where q is the prediction itself, the gradient of cross-entropy times 1 - beta p_y, as in focal losses."""
        logits, labels = maps(3).requires_grad_(), random_labels((6, 9))
        p = logits.detach().softmax(dim=1)
        (gradient,) = torch.autograd.grad(soft_label_cross_entropy(logits, labels, p, 0.6, adaptive_beta=True), logits)
        (of_label,) = torch.autograd.grad(soft_label_cross_entropy(logits, labels), logits)
        p_y = p.gather(1, labels.where(labels != 255, 0).unsqueeze(1))
        torch.testing.assert_close(gradient, (1 - 0.6 * p_y) * of_label)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_fused_gradient_of_half_precision_logits(self, dtype):
        logits, labels = maps(3).to(dtype).requires_grad_(), random_labels()
        scale = 2.0**14  # what a gradient scaler multiplies by
        fused, plain = (
            torch.autograd.grad(soft_label_cross_entropy(logits, labels, fused=fused) * scale, logits)[0]
            for fused in (True, False)
        )
        assert fused.dtype == dtype
        torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-3)

    def test_fused_with_a_gradient_scaler(self):
        parameter = torch.nn.Parameter(maps(3))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before, labels = parameter.detach().clone(), random_labels()
        with torch.autocast("cpu", torch.bfloat16):
            loss = soft_label_cross_entropy(parameter, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        leaf = before.clone().requires_grad_()
        (expected,) = torch.autograd.grad(soft_label_cross_entropy(leaf, labels, fused=False), leaf)
        torch.testing.assert_close(before - parameter.detach(), expected, rtol=1e-4, atol=1e-7)

    def test_fused_under_gradient_checkpointing(self):
        layer, x, labels = torch.nn.Conv2d(4, 3, 1), maps(4), random_labels()

        def loss_of(x):
            return soft_label_cross_entropy(layer(x), labels)

        expected = torch.autograd.grad(loss_of(x), layer.weight)[0]
        loss = torch.utils.checkpoint.checkpoint(loss_of, x, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(loss, layer.weight)[0], expected)

    def test_fused_has_first_order_gradients_only(self):
        logits = maps(3).requires_grad_()
        (gradient,) = torch.autograd.grad(soft_label_cross_entropy(logits, random_labels()), logits, create_graph=True)
        assert not gradient.requires_grad

    def test_plain_has_gradients_of_any_order(self):
        logits = maps(3, (2, 2)).double().requires_grad_()
        labels = random_labels((4, 4))
        (gradient,) = torch.autograd.grad(
            soft_label_cross_entropy(logits, labels, fused=False), logits, create_graph=True
        )
        gradient.square().sum().backward()
        assert logits.grad.norm() > 0

    def test_fused_without_gradient(self):
        logits, labels = maps(3), random_labels()
        assert not soft_label_cross_entropy(logits, labels).requires_grad
        with torch.no_grad():
            loss = soft_label_cross_entropy(logits.clone().requires_grad_(), labels)
        assert loss == soft_label_cross_entropy(logits, labels)

    def test_fused_leaves_its_inputs_alone(self):
        logits, labels, q = maps(3), random_labels((6, 9)), maps(3, seed=1).softmax(dim=1)
        before = logits.clone(), q.clone()
        soft_label_cross_entropy(logits.requires_grad_(), labels, q, 0.5).backward()
        assert torch.equal(logits, before[0])
        assert torch.equal(q, before[1])

    def test_fused_channels_last_logits(self):
        logits, labels = maps(5), random_labels(classes=5)
        expected = soft_label_cross_entropy(logits, labels)
        assert soft_label_cross_entropy(logits.to(memory_format=torch.channels_last), labels) == expected

    def test_full_resolution_logits_exist_nowhere(self):
        """19 classes at 1024 x 1024 are 80 MB in float32, and the plain path holds several of them."""
        script = (
            "import resource, torch\n"
            "from pals_hf.functional import soft_label_cross_entropy\n"
            "def run(size):\n"
            "    z = torch.randn(1, 19, size // 4, size // 4, requires_grad=True)\n"
            "    q, y = z.detach().softmax(1), torch.randint(0, 19, (1, size, size))\n"
            "    soft_label_cross_entropy(z, y, q, 0.3).backward()\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = run(64)\n"
            "print(run(1024) - before)"
        )
        extra = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
        assert extra < 70 * 1024  # KiB: 8 MB of labels, 4 x 5 MB of maps, tiles

    @FUSED
    @pytest.mark.parametrize("label", [3, -100])
    def test_a_label_outside_the_classes(self, label, fused):
        labels = random_labels()
        labels[0, 0, 0] = label
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            soft_label_cross_entropy(maps(3), labels, fused=fused)

    def test_num_items_with_distillation_are_two(self):
        logits, labels, q = maps(3), random_labels(), maps(3, seed=1).softmax(dim=1)
        whole = soft_label_cross_entropy(logits, labels, q, 0.3, distill_unlabeled=True)
        counts = count_pixels(labels, distill_unlabeled=True)
        assert counts.tolist() == [(labels != 255).sum(), (labels == 255).sum()]
        parts = [
            soft_label_cross_entropy(
                logits[i : i + 1], labels[i : i + 1], q[i : i + 1], 0.3, num_items=counts, distill_unlabeled=True
            )
            for i in range(2)
        ]
        torch.testing.assert_close(sum(parts), whole)
        with pytest.raises(ValueError, match="num_items must be two numbers, of"):
            soft_label_cross_entropy(logits, labels, q, 0.3, num_items=7, distill_unlabeled=True)

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

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("beta", [0.0, 0.4])
    def test_class_weights(self, fused, beta):
        """Of the label alone as torch weighs them; of the whole soft label, a mean weighted by the label's class."""
        logits, q, labels = class_weight_inputs()
        weights = torch.tensor([0.5, 2.0, 0.0, 1.25])
        logits.requires_grad_()
        options = {"class_weights": weights, "fused": fused}
        loss = soft_label_cross_entropy(logits, labels, q if beta else None, beta, **options)
        up, up_q = upsample(logits, labels.shape[1:]), upsample(q, labels.shape[1:])
        one_hot = F.cross_entropy(up, labels, weight=weights, ignore_index=255)
        of_pixel = torch.where(labels == 255, 0.0, weights[labels.where(labels != 255, 0)])
        soft = (-(up_q * up.log_softmax(dim=1)).sum(dim=1) * of_pixel).sum() / of_pixel.sum()
        expected = (1 - beta) * one_hot + beta * soft
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients)
        counts = count_pixels(labels, class_weights=weights)
        assert counts[0].item() == pytest.approx(of_pixel.sum().item())
        halves = [
            soft_label_cross_entropy(
                logits[i : i + 1], labels[i : i + 1], q[i : i + 1], beta, num_items=counts, **options
            )
            for i in range(2)
        ]
        torch.testing.assert_close(sum(halves), loss)

    def test_weighted_pixels_on_a_device_without_float64(self, monkeypatch):
        labels, weights = torch.randint(0, 4, (2, 9, 7)), torch.tensor([0.5, 1.0, 2.0, 0.25])
        there = count_pixels(labels, class_weights=weights)
        monkeypatch.setattr("pals_hf.functional.soft_labels.widest_float", lambda device: torch.float32)
        here = count_pixels(labels, class_weights=weights)
        assert (there.dtype, here.dtype) == (torch.float64, torch.float32)
        assert torch.equal(here.double(), there)  # these weights are exact in both

    def test_class_weights_of_another_number(self):
        logits, _, labels = class_weight_inputs()
        with pytest.raises(ValueError, match="class_weights must be 4 numbers"):
            soft_label_cross_entropy(logits, labels, class_weights=torch.ones(3))

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
            ({"beta": 0.5}, "beta=0.5 needs an aggregated distribution"),
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


class TestUpsampleArgmax:
    @pytest.mark.parametrize("classes", [2, 4, 19])
    @pytest.mark.parametrize("size", [(24, 36), (25, 31), (6, 9), (3, 4)])
    def test_is_the_argmax_of_upsampled_logits(self, classes, size):
        logits = maps(classes)
        assert torch.equal(upsample_argmax(logits, size), upsample(logits, size).argmax(dim=1))

    def test_the_first_of_equals_wins(self):
        assert (upsample_argmax(torch.zeros(1, 9, 2, 2), (4, 4)) == 0).all()


def test_entropy():
    p = torch.tensor([[[1.0, 0.5]], [[0.0, 0.5]]]).unsqueeze(0)
    torch.testing.assert_close(entropy(p), torch.tensor([[[0.0, 0.693147]]]))
