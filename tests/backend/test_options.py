"""Windows from checkpoints and options: the right result, or an error that says what to do."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3OmniMoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from swa_backend.layers import LayerPlan, resolve_layers
from swa_backend.options import SWAConfigError, SWAOptions, parse_layers
from tests.helpers.tiny_models import BY_LAYER_TYPES, FULL, MIXED, SLIDING, WINDOW, tiny_config

W = WINDOW


def _resolve(checkpoint: dict[str, Any], options: Any = None, **kwargs: Any) -> Any:
    config = tiny_config(**checkpoint)
    for key, value in kwargs.get("hf_overrides", {}).items():
        setattr(config, key, value)  # as vLLM applies them: after layer_types was derived
    return resolve_layers(config, SWAOptions.from_dict(options or {}), **kwargs)


@pytest.mark.parametrize(
    ("checkpoint", "options", "windows"),
    [
        (FULL, {}, (None,) * 4),
        (SLIDING, {}, (W,) * 4),
        (MIXED, {}, (None, None, W, W)),
        (BY_LAYER_TYPES, {}, (W, None, W, None)),
        (FULL, {"window": 64}, (64,) * 4),
        (FULL, {"window": 64, "full_attention_layers": "every:4"}, (64, 64, 64, None)),
        (FULL, {"window": 64, "full_attention_layers": "none"}, (64,) * 4),
        (MIXED, {"window": 64}, (None, None, 64, 64)),
        (MIXED, {"full_attention_layers": [3]}, (W, W, W, None)),
        (SLIDING, {"full_attention_layers": "0-1,3"}, (None, None, W, None)),
        (SLIDING, {"enabled": False}, (None,) * 4),
        (FULL, {"enabled": True}, (None,) * 4),
        (
            {**FULL, "layer_types": BY_LAYER_TYPES["layer_types"]},
            {"window": 8},
            (8, None, 8, None),
        ),
    ],
)
def test_effective_windows(
    checkpoint: dict[str, Any], options: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert _resolve(checkpoint, options).windows == windows


def test_every_fourth_layer_is_the_last_of_four() -> None:
    assert sorted(parse_layers("every:4", 36)) == list(range(3, 36, 4))


@given(st.sets(st.integers(0, 40)))
def test_layers_as_list_and_as_text_are_the_same(layers: set[int]) -> None:
    if layers:
        assert parse_layers(",".join(map(str, layers)), 41) == parse_layers(layers, 41) == layers


@pytest.mark.parametrize(
    ("checkpoint", "options", "windows"),
    [
        ({"use_sliding_window": False}, {}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8}, {}, (8,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, {}, (8,) * 4),
        (BY_LAYER_TYPES, {}, (W, None, W, None)),
        (FULL, {"window": 8, "full_attention_layers": [1]}, (8, None, 8, 8)),
        (MIXED, {"full_attention_layers": "none"}, (W,) * 4),
        (MIXED, {"full_attention_layers": "0-1"}, (None, None, W, W)),
    ],
)
def test_effective_windows_of_moe(
    checkpoint: dict[str, Any], options: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = Qwen3MoeConfig(num_hidden_layers=4, **checkpoint)
    assert resolve_layers(config, SWAOptions.from_dict(options)).windows == windows


@pytest.mark.parametrize(
    ("first", "remedy"),
    [(2, '"full_attention_layers": "0-1"'), (4, '"enabled": false'), (9, '"enabled": false')],
)
def test_max_window_layers_of_moe_is_ambiguous(first: int, remedy: str) -> None:
    config = Qwen3MoeConfig(num_hidden_layers=4, **{**MIXED, "max_window_layers": first})
    which = "all" if first >= 4 else "these"
    with pytest.raises(SWAConfigError, match=f"leave {which} layers full.*{remedy}"):
        resolve_layers(config, SWAOptions())


def test_sinks_of_no_window_are_refused() -> None:
    for options in ({"sink_tokens": 1}, {"sink_tokens": 4, "enabled": False}):
        with pytest.raises(SWAConfigError, match=r"swa\.sink_tokens would have no effect"):
            _resolve(FULL, options)


def test_phase_of_no_window_is_refused() -> None:
    for options in ({"phase": "prefill"}, {"phase": "prefill", "enabled": False}):
        with pytest.raises(SWAConfigError, match=r"swa\.phase would have no effect"):
            _resolve(FULL, options)


def test_phase_of_a_checkpoint_with_a_window_warns() -> None:
    (warning,) = _resolve(MIXED, {"phase": "prefill"}).warnings
    assert 'trained with a window, and swa.phase="prefill"' in warning
    assert not _resolve(MIXED, {"phase": "both"}).warnings
    assert not _resolve(FULL, {"phase": "prefill", "window": 8}).warnings


@pytest.mark.parametrize("checkpoint", [FULL, MIXED], ids=["full", "mixed"])
def test_windows_by_layer_leave_the_others_full(checkpoint: dict[str, Any]) -> None:
    plan = _resolve(checkpoint, {"window": {"0": 8, "every:2": 16}})
    assert plan.windows == (8, 16, None, 16)
    assert _resolve(checkpoint, {"window": {"0-3": 8}}).windows == (8,) * 4


def _resolve_hybrid(options: dict[str, Any], **checkpoint: Any) -> LayerPlan:
    config = Qwen3NextConfig(num_hidden_layers=8, **checkpoint)
    return resolve_layers(config, SWAOptions.from_dict(options))


def test_only_layers_that_attend_have_windows() -> None:
    slides = (None, None, None, W, None, None, None, W)
    plan = _resolve_hybrid({"window": W})
    assert plan.windows == slides
    assert plan.linear == {0, 1, 2, 4, 5, 6}
    assert plan.layer_types == [*["linear_attention"] * 3, "sliding_attention"] * 2
    assert _resolve_hybrid({"window": W, "full_attention_layers": "none"}).windows == slides
    last = (None,) * 7 + (W,)
    for options in (
        {"window": W, "full_attention_layers": "3"},
        {"window": {"7": W}},
        {"window": {"every:8": W}},
    ):
        assert _resolve_hybrid(options).windows == last
    for options in ({}, {"enabled": False}):
        assert not _resolve_hybrid(options).slides


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": W, "full_attention_layers": "0-3"}, r"'0-3' names layer 0.*attend: 3, 7$"),
        ({"window": {"3-5": W}}, r"names layer 4, which has linear attention.*attend: 3, 7$"),
        ({"window": W, "full_attention_layers": "every:4"}, r"names all 2 layers that attend"),
        ({"sink_tokens": 4}, r"no layer has a window"),
    ],
)
def test_layers_that_do_not_attend_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SWAConfigError, match=message):
        _resolve_hybrid(options)


def test_layer_types_that_a_hybrid_lacks_are_refused() -> None:
    config = Qwen3NextConfig(num_hidden_layers=2)
    for kind in ("sliding_attention", "mamba"):
        config.layer_types = ["full_attention", kind]
        with pytest.raises(SWAConfigError, match=f"{kind}; qwen3_next has full_attention and lin"):
            resolve_layers(config, SWAOptions(window=W))
    with pytest.raises(SWAConfigError, match="all layers of this model have linear attention"):
        _resolve_hybrid({"window": W}, layer_types=["linear_attention"] * 8)


def test_each_window_that_never_slides_is_warned_of() -> None:
    long = 512
    for window, warnings in (
        ({"0": 8, "1": long}, [f"window {long} is not below max_model_len"]),
        ({"0": long, "1": long + 1}, [f"window {long} is", f"window {long + 1} is"]),
        ({"0": long, "1": long}, [f"window {long} is not below"]),
    ):
        said = _resolve(FULL, {"window": window}, max_model_len=long).warnings
        assert len(said) == len(warnings)
        assert all(start in text for start, text in zip(warnings, said, strict=True))


UNREAD = {
    "sliding_window_pattern": 4,
    "_sliding_window_pattern": 6,
    "swaa_config": {"sliding_window_size": 2048, "non_sliding_layers": [1, 3]},
    "swa_layers": [0],
    "attention_window_size": 512,
    "attention_sinks": 4,
}
DECIDED = {"window": 64, "full_attention_layers": "none"}


@pytest.mark.parametrize("key", UNREAD)
@pytest.mark.parametrize("checkpoint", [FULL, SLIDING], ids=["full", "sliding"])
def test_unread_keys_of_windows_and_sinks_are_refused(checkpoint: dict[str, Any], key: str) -> None:
    keys = {**checkpoint, key: UNREAD[key]}
    remedy = {**DECIDED, "sink_tokens": 4} if "sinks" in key else DECIDED
    for options in ({}, {"window": 64}, {"full_attention_layers": "0"}):
        with pytest.raises(SWAConfigError, match=rf"config has {key}=.*nothing reads.*remove it"):
            _resolve(keys, options)
    assert _resolve(keys, remedy).windows == (64,) * 4
    assert _resolve(keys, {"enabled": False}).windows == (None,) * 4
    assert _resolve({**checkpoint, key: None}) == _resolve(checkpoint)


# Of config.json files on the Hugging Face hub, as far as they speak of windows.
PUBLISHED = {
    "Qwen3-0.6B": {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False},
    "Qwen3-4B-2507": {"max_window_layers": 36, "sliding_window": None, "use_sliding_window": False},
    "no word of it": {},
}


@pytest.mark.parametrize("keys", PUBLISHED.values(), ids=PUBLISHED)
def test_published_checkpoints_are_served(keys: dict[str, Any]) -> None:
    assert _resolve(keys).windows == (None,) * 4


@pytest.mark.parametrize(
    "config",
    [Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig, Qwen3VLMoeConfig, Qwen3OmniMoeConfig],
    ids=lambda config: config.model_type,
)
def test_no_config_of_transformers_has_an_unread_key(config: Any) -> None:
    """With a window and layers by options nothing else of it matters."""
    text = config().get_text_config()
    text.rswa_window = 4096  # as the engine may set it
    resolve_layers(text, SWAOptions(window=64))


def test_override_of_layer_types_takes_effect() -> None:
    late = {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 0}
    overrides = {**late, "layer_types": ["sliding_attention"] * 4}
    assert _resolve(FULL, hf_overrides=overrides).windows == (W,) * 4


@pytest.mark.parametrize("length", [W, W - 1])
def test_any_length_up_to_the_window_is_warned_of(length: int) -> None:
    (warning,) = _resolve(SLIDING, max_model_len=length).warnings
    assert "nothing will ever slide" in warning


def test_window_that_never_slides_is_warned_of() -> None:
    assert _resolve(SLIDING, max_model_len=W + 1).warnings == ()
    (warning,) = _resolve(SLIDING, max_model_len=W).warnings
    assert "nothing will ever slide" in warning
    assert _resolve(SLIDING, {"sink_tokens": 4}, max_model_len=W + 5).warnings == ()
    (warning,) = _resolve(SLIDING, {"sink_tokens": 4}, max_model_len=W + 4).warnings
    assert f"window {W} with 4 sink tokens is not below max_model_len {W + 4}" in warning


def test_sinks_beyond_the_trained_length_are_warned_of() -> None:
    sinks = {"sink_tokens": 4}

    def warnings(length: int, options: dict[str, Any] = sinks, **keys: Any) -> tuple[str, ...]:
        overrides = {k: v for k, v in keys.items() if k == "max_position_embeddings"}
        config = {**SLIDING, "max_position_embeddings": 500, **keys}
        return _resolve(config, options, hf_overrides=overrides, max_model_len=length).warnings

    assert warnings(500) == ()
    assert warnings(501, {"sink_tokens": 4, "position_shift": True}) == ()
    assert warnings(501, {}) == ()
    (warning,) = warnings(501)
    assert "goes beyond the trained length of 500" in warning
    assert "Set swa.position_shift=true, or lower max_model_len" in warning
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    rope = {**yarn, "original_max_position_embeddings": 125}
    assert "trained length of 125" in warnings(126, rope_parameters=rope)[0]
    # Raised by the user: what it was is not known.
    assert "the trained length: distances" in warnings(400, max_position_embeddings=1000)[0]


class DerivedText:
    """The text config of a model that contains a Qwen3: transformers gives it no window keys."""

    model_type = "qwen3_vl_text"
    num_hidden_layers = 4


@pytest.mark.parametrize(
    ("keys", "options", "windows"),
    [
        ({}, {}, (None,) * 4),
        ({}, {"window": 8}, (8,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8}, {}, (8,) * 4),
        ({"use_sliding_window": False, "sliding_window": 8}, {}, (None,) * 4),
        ({"sliding_window": 8}, {"window": 9}, (9,) * 4),
        ({"sliding_window": 8}, {"full_attention_layers": "0-2"}, (None, None, None, 8)),
        ({"sliding_window": 8}, {"enabled": False}, (None,) * 4),
        (
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
            {},
            (None, 8) * 2,
        ),
    ],
)
def test_text_config_of_a_derived_model(
    keys: dict[str, Any], options: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = DerivedText()
    vars(config).update(keys)
    assert resolve_layers(config, SWAOptions.from_dict(options)).windows == windows


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sliding_window": 8}, "without use_sliding_window is ambiguous for qwen3_vl_text"),
        ({"use_sliding_window": True}, "the checkpoint gives no window"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "ignores it for qwen3_vl_text",
        ),
    ],
)
def test_text_config_of_a_derived_model_that_is_ambiguous(
    keys: dict[str, Any], message: str
) -> None:
    config = DerivedText()
    vars(config).update(keys)
    with pytest.raises(SWAConfigError, match=message):
        resolve_layers(config, SWAOptions())


@pytest.mark.parametrize("first", [1, 3])
def test_override_of_the_first_sliding_layer_that_comes_too_late_is_refused(first: int) -> None:
    """In transformers the first two layers have become full by then."""
    with pytest.raises(SWAConfigError, match="max_window_layers has no effect"):
        _resolve(MIXED, hf_overrides={"max_window_layers": first})
    plan = _resolve(MIXED, hf_overrides={"max_window_layers": 2})
    assert plan.windows == (None, None, W, W)
    assert plan.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


def test_layer_types_are_as_many_as_layers_unless_all_are_full() -> None:
    def resolve(kinds: list[str], overrides: dict[str, Any] | None = None) -> Any:
        config = tiny_config(**SLIDING)
        config.layer_types = kinds
        if set(kinds) == {"full_attention"}:
            config.use_sliding_window = False
        return resolve_layers(config, SWAOptions(), hf_overrides=overrides).windows

    assert resolve(["full_attention"] * 5) == (None,) * 4
    assert resolve(["sliding_attention"] * 5, {"num_hidden_layers": 4}) == (W,) * 4
    with pytest.raises(SWAConfigError, match="layer_types has 5 entries for num_hidden_layers=4"):
        resolve(["sliding_attention"] * 5)
    with pytest.raises(SWAConfigError, match="layer_types has 5 entries for num_hidden_layers=4"):
        resolve(["sliding_attention"] * 5, {"num_hidden_layers": 4, "layer_types": []})


@pytest.mark.parametrize("option", [{"window": 8}, {"full_attention_layers": "0"}])
def test_options_of_windows_contradict_switching_them_off(option: dict[str, Any]) -> None:
    with pytest.raises(SWAConfigError, match=r"would have no effect: swa\.enabled is false"):
        _resolve(SLIDING, {"enabled": False, **option})


@pytest.mark.parametrize("sinks", [64, 65])
def test_sinks_of_the_longest_request_or_more_are_refused(sinks: int) -> None:
    with pytest.raises(SWAConfigError, match=f"sink_tokens={sinks} is not below max_model_len 64"):
        _resolve(SLIDING, {"sink_tokens": sinks}, max_model_len=64)


@pytest.mark.parametrize("window", [0, None])
def test_checkpoint_without_a_window_is_refused_as_that(window: int | None) -> None:
    config = tiny_config(**SLIDING)
    config.sliding_window = window
    with pytest.raises(SWAConfigError, match="the checkpoint gives no window"):
        resolve_layers(config, SWAOptions())
