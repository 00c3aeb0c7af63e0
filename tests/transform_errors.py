"""Bad input to what concerns transforms: rows of the table in test_errors.py."""

from flows import random_flow, random_images, random_noise

from tarflow_fast import LogisticMixture, Spline, TarFlow, TokenFlow
from tarflow_fast.verify.flow import verify_flow

X, Z, AFFINE = random_images(random_flow()), random_noise(random_flow()), random_flow()
KINDS = "one of affine, shift, logistic_mixture, spline, its sizes after colons"
MIXED = random_flow(transform="logistic_mixture:2")


def mixed_asked_for(backend):
    flow = random_flow(transform="logistic_mixture:2")
    flow.backend = backend
    return flow


TRANSFORM_CALLS = [
    (
        lambda: TarFlow(1, 8, 2, 64, 1, 1, transform="quadratic"),
        ValueError,
        f"TarFlow: transform must be {KINDS}, got 'quadratic'",
    ),
    (
        lambda: TokenFlow(5, 3, 64, 1, 1, transform="affine:3"),
        ValueError,
        f"TokenFlow: transform must be {KINDS}, got 'affine:3' (Affine() takes no arguments)",
    ),
    (
        lambda: TokenFlow(5, 3, 64, 1, 1, transform="logistic_mixture:0"),
        ValueError,
        f"TokenFlow: transform must be {KINDS}, got 'logistic_mixture:0' "
        "(LogisticMixture: components must be >= 1, got 0)",
    ),
    (
        lambda: TokenFlow(5, 3, 64, 1, 1, transform="logistic_mixture:a"),
        ValueError,
        f"TokenFlow: transform must be {KINDS}, got 'logistic_mixture:a' (could not convert string to float: 'a')",
    ),
    (
        lambda: TarFlow(1, 8, 2, 64, 1, 1, transform=3),
        TypeError,
        f"TarFlow: transform must be a transform or a string, {KINDS}, got int",
    ),
    (
        lambda: TarFlow(1, 8, 2, 64, 1, 1, False, transform="affine"),
        ValueError,
        "TarFlow: transform must be shift where nvp is False, got 'affine'",
    ),
    (lambda: LogisticMixture(2.0), TypeError, "LogisticMixture: components must be an int, got float"),
    (lambda: Spline(1), ValueError, "Spline: bins must be >= 2, got 1"),
    (lambda: Spline(65), ValueError, "Spline: bins must be <= 64, got 65"),
    (lambda: Spline(True), TypeError, "Spline: bins must be an int, got bool"),
    (
        lambda: MIXED.reverse(Z, guidance=1.0),
        ValueError,
        "reverse: guidance must be 0 for the transform 'logistic_mixture:2', because no rule has been published for "
        "guiding its parameters, got 1.0",
    ),
    (
        lambda: MIXED.load_state_dict(AFFINE.state_dict()),
        ValueError,
        "load_state_dict: blocks.0 must have the transform logistic_mixture:2, got affine",
    ),
    (
        lambda: mixed_asked_for("triton")(X),
        RuntimeError,
        "layer_norm: backend 'triton' cannot run: it needs GPU tensors, or TRITON_INTERPRET=1 for CPU tensors, got cpu",
    ),
    (
        lambda: mixed_asked_for("cpu")(X),
        RuntimeError,
        "logistic_mixture: backend 'cpu' cannot run: its density is computed by PyTorch alone",
    ),
    (
        lambda: verify_flow(MIXED),
        ValueError,
        "verify_flow: flow must have the transform affine or shift, got logistic_mixture:2: no limit is derived",
    ),
]
