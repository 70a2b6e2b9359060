from __future__ import annotations

import pytest

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.pattern import parse_pattern, resolve_layers
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("LLLN * 3", "LLLN" * 3),
        ("LLLN", "LLLN"),
        ('"LLLN" * 2', "LLLN" * 2),
        ("'LN'*2 + L", "LN" * 2 + "L"),
        ("(L * 3 + N) * 2", ("L" * 3 + "N") * 2),
        ("[L + (MN) * 2] * 2 + N", ("L" + "MN" * 2) * 2 + "N"),
        (" L*2 * 3 ", "L" * 6),
    ],
)
def test_parses(text: str, symbols: str) -> None:
    assert parse_pattern(text) == symbols


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "position 1"),
        ("L *", "expected a positive number at position 4"),
        ("L * 0", "expected a positive number at position 5"),
        ("L * N", "expected a positive number at position 5"),
        ("3 * L", "at position 1"),
        ("L N", "unexpected 'N'"),
        ("(L + N", "expected ')' at position 7"),
        ("[L)", "expected ']' at position 3"),
        ("L)", "at position 2"),
        ("L - N", "unexpected '-' at position 3"),
        ("'LN", "at position 1"),
        ("L * 1000000000000", "at position 5"),
        ("L * 99999999999999999999", "at position"),
    ],
)
def test_refuses(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pattern(text)
    assert problem in str(caught.value)


def model(**values: object) -> ModelConfig:
    return from_dict(ModelConfig, values)


def test_symbols_resolve_to_mixer_and_ffn() -> None:
    config = model(
        num_layers=5,
        pattern="L + M + N + D + L",
        mixer={"type": "gated_deltanet"},
        ffn="moe",
        symbols={"M": {"mixer": {"type": "mamba2"}}, "N": {"ffn": "dense"}, "D": {"ffn": "dense"}},
    )
    got = [(layer.symbol, layer.mixer.type, layer.ffn) for layer in resolve_layers(config)]
    assert got == [
        ("L", "gated_deltanet", "moe"),
        ("M", "mamba2", "moe"),
        ("N", "attention", "dense"),
        ("D", "gated_deltanet", "dense"),
        ("L", "gated_deltanet", "moe"),
    ]


@pytest.mark.parametrize(
    ("first_dense", "frequency", "kinds"),
    [(0, 1, "mmmmmm"), (2, 1, "ddmmmm"), (0, 2, "mdmdmd"), (1, 2, "dmdmdm"), (2, 3, "ddmddm")],
)
def test_dense_layers_among_experts(first_dense: int, frequency: int, kinds: str) -> None:
    """Dense layers are chosen by their index, whatever their mixer; a symbol with its own ffn keeps it."""
    moe = {"first_dense_layers": first_dense, "layer_frequency": frequency}
    for pattern in ("LLN * 2", "N * 6"):
        layers = resolve_layers(model(num_layers=6, pattern=pattern, moe=moe))
        assert "".join(layer.ffn[0] for layer in layers) == kinds
    symbols = {"D": {"ffn": "dense"}, "E": {"ffn": "moe"}}
    layers = resolve_layers(model(num_layers=6, pattern="EDLEDL", moe=moe, symbols=symbols))
    assert "".join(layer.ffn[0] for layer in layers) == f"md{kinds[2]}md{kinds[5]}"
    layers = resolve_layers(model(num_layers=2, pattern="LE", ffn="dense", moe=moe, symbols=symbols))
    assert [layer.ffn for layer in layers] == ["dense", "moe"]


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"pattern": "LLLN * 3", "num_layers": 4}, ["12 layers", "num_layers = 4", "model.num_layers=12"]),
        ({"pattern": "LLLX", "num_layers": 4}, ["unknown symbol 'X'", "model.symbols.X", "L, N"]),
        ({"symbols": {"MM": {}}}, ["model.symbols.MM", "one letter"]),
    ],
)
def test_refuses_layers(values: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_layers(model(**values))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
