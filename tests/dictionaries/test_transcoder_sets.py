"""A set of transcoders reads what is asked of it and no more, whatever its size, and decodes as its formula says."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import save_file

from forebay.stages.dictionaries.activation import Sparse
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.formats.stored import safetensors_headers
from forebay.stages.dictionaries.transcoders import TranscoderSet

from .golden_values import GOLDEN, assert_equal, many, values_of

HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
SIZES = {"BF16": 2, "F32": 4}
READ = Path("/proc/self/io")


class Huge:
    """A cross-layer set of the size of the largest published: 160 GB, of which nothing is on the disk but headers."""

    n_layers, n_feature, d = 26, 98_304, 2_304

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        configuration = HOOKS | {"model_kind": "cross_layer_transcoder"}
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
        for layer in range(self.n_layers):
            encoder = {
                f"W_enc_{layer}": (self.n_feature, self.d),
                f"b_enc_{layer}": (self.n_feature,),
                f"b_dec_{layer}": (self.d,),
            }
            self.write(f"W_enc_{layer}", encoder)
            self.write(f"W_dec_{layer}", {f"W_dec_{layer}": (self.n_feature, self.n_layers - layer, self.d)})

    def write(self, name: str, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
        """A safetensors file of zeros that take no room."""
        header, end = {}, 0
        for tensor, shape in shapes.items():
            begin, end = end, end + prod(shape) * SIZES[dtype]
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (self.folder / f"{name}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)

    def put(self, layer: int, target: int, feature: int, row: torch.Tensor) -> None:
        """Write one row where it belongs."""
        stored = safetensors_headers(self.folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        place = (feature * (self.n_layers - layer) + target - layer) * self.d
        with stored.path.open("r+b") as file:
            file.seek(stored.offset + place * 2)
            file.write(row.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Huge]:
    made = Huge(tmp_path_factory.mktemp("huge") / "clt")
    yield made
    for path in made.folder.iterdir():  # what looks like 160 GB is not left behind
        path.unlink()


@contextmanager
def reading_at_most(n_bytes: int) -> Iterator[None]:
    """The process reads no more than this from files meanwhile, by the system's own count."""

    def count() -> int:
        return int(READ.read_text().split("rchar: ")[1].split()[0])

    if not READ.exists():
        pytest.skip("needs /proc/self/io")
    before = count()
    yield
    assert count() - before <= n_bytes


def test_a_set_of_160_gb_opens_by_its_headers(huge: Huge) -> None:
    size = sum(path.stat().st_size for path in huge.folder.iterdir())
    assert size > 160e9
    with reading_at_most(100_000):
        transcoders = many(huge.folder)
    assert transcoders.n_features == (98_304,) * 26
    assert (transcoders.d_in, transcoders.d_out) == (2_304, 2_304)


def test_rows_of_a_decoder_larger_than_memory_are_read_alone(huge: Huge) -> None:
    torch.manual_seed(0)
    rows = {98_303: torch.randn(2_304), 0: torch.randn(2_304), 54_321: torch.randn(2_304)}
    for feature, row in rows.items():
        huge.put(2, 19, feature, row)
    transcoders = many(huge.folder, dtype=torch.bfloat16)
    asked = [54_321, 98_303, 0, 54_321, 7]
    with reading_at_most(len(asked) * 2_304 * 2 + 2_000):
        found = transcoders.decoder_rows(2, 19, asked)
    expected = torch.stack([rows.get(feature, torch.zeros(2_304)) for feature in asked]).to(torch.bfloat16)
    assert torch.equal(found, expected)
    assert not transcoders.decoder_rows(2, 20, asked).any()


def test_decoding_reads_the_rows_of_what_fires(huge: Huge) -> None:
    transcoders = many(huge.folder)
    values = torch.zeros(3, 98_304)
    values[0, 5], values[2, 77_000], values[2, 5] = 1.0, 2.0, 3.0
    fired = Sparse.from_dense(values)
    row = torch.arange(2_304) / 16
    huge.put(1, 3, 5, row)
    nothing = Sparse.from_dense(torch.zeros(3, 98_304))
    features = {0: nothing, 1: fired, 2: nothing, 3: nothing}
    with reading_at_most(3 * 2_304 * 2 + 20_000):
        out = transcoders.decode(3, features)
    kept = row.to(torch.bfloat16).float()
    assert torch.equal(out, torch.stack([kept, torch.zeros(2_304), 3 * kept]))


def test_the_bias_of_a_layer_is_read_without_its_encoder(huge: Huge) -> None:
    transcoders = many(huge.folder)
    with reading_at_most(2_304 * 2 + 2_000):
        assert transcoders.decoder_bias(25).shape == (2_304,)


def test_a_set_travels_to_another_process_as_a_few_words(huge: Huge) -> None:
    transcoders = many(huge.folder)
    with reading_at_most(1_000):
        message = pickle.dumps(transcoders)
        arrived = pickle.loads(message)  # noqa: S301  our own
    assert len(message) < 50_000
    assert isinstance(arrived, TranscoderSet)
    assert arrived.decoder_rows(4, 9, [3]).shape == (1, 2_304)


def test_a_file_that_is_cut_off_is_refused_when_the_set_is_opened(tmp_path: Path) -> None:
    class Small(Huge):
        n_layers, n_feature, d = 3, 40, 7

    made = Small(tmp_path / "clt")
    path = made.folder / "W_dec_1.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(DictionaryError, match="is cut off: W_dec_1 ends at byte"):
        many(made.folder)


def test_a_file_that_is_cut_off_later_is_refused_when_it_is_read(tmp_path: Path) -> None:
    class Small(Huge):
        n_layers, n_feature, d = 3, 40, 7

    made = Small(tmp_path / "clt")
    stored = safetensors_headers(made.folder / "W_dec_1.safetensors")["W_dec_1"]
    with stored.path.open("r+b") as file:
        file.truncate(stored.path.stat().st_size - 1)
    assert stored.rows(torch.tensor([38]), 1).shape == (1, 7)
    with pytest.raises(DictionaryError, match="it ends within W_dec_1"):
        stored.rows(torch.tensor([39]), 1)


# ── what is decoded ──────────────────────────────────────────────────────────────────────────────────────────────────


def dense(transcoders: TranscoderSet, target: int, features: NDArray[np.float64]) -> NDArray[np.float64]:
    """m̂_t = b_dec_t + Σ_{l ≤ t} Σ_j f_l,j W_dec_l→t[j], feature by feature."""
    out = np.tile(transcoders.decoder_bias(target).double().numpy(), (features.shape[1], 1))
    for layer in range(target + 1) if transcoders.cross_layer else (target,):
        rows = transcoders.decoder_rows(layer, target).double().numpy()
        for j in range(transcoders.n_features[layer]):
            out += features[layer, :, j, None] * rows[j]
    return out


@pytest.mark.parametrize("case", ["clt_relu", "clt_jumprelu", "relu", "jumprelu"])
def test_decode_is_the_sum_of_what_every_feature_writes_at_every_target(case: str) -> None:
    transcoders = many(GOLDEN / "circuit_tracer" / case)
    torch.manual_seed(1)
    features = torch.randn(transcoders.n_layers, 9, transcoders.n_features[0]).relu()
    given = {layer: Sparse.from_dense(values) for layer, values in enumerate(features)}
    for target in range(transcoders.n_layers):
        expected = torch.from_numpy(dense(transcoders, target, features.double().numpy()))
        assert_equal(transcoders.decode(target, given), expected.float())


def test_a_row_where_nothing_fires_is_the_bias() -> None:
    transcoders = many(GOLDEN / "circuit_tracer" / "clt_relu")
    nothing = {layer: Sparse.from_dense(torch.zeros(2, 18)) for layer in range(4)}
    assert torch.equal(transcoders.decode(3, nothing), transcoders.decoder_bias(3).repeat(2, 1))


@pytest.mark.parametrize("case", ["relu", "skip", "gemma_scope", "gemma_scope_2"])
def test_a_layer_is_its_encoder_and_its_rows(case: str) -> None:
    transcoders = many(GOLDEN / "circuit_tracer" / case)
    for number in range(transcoders.n_layers):
        layer, encoder = transcoders.layer(number), transcoders.encoder(number)
        assert torch.equal(layer.W_enc, encoder.W_enc)
        assert torch.equal(layer.W_dec, transcoders.decoder_rows(number, number))
        assert torch.equal(layer.b_dec, transcoders.decoder_bias(number))
        assert (layer.hook, layer.hook_out) == (transcoders.hooks_in[number], transcoders.hooks_out[number])
        x = values_of(GOLDEN / "circuit_tracer" / case)["x"][number]
        given = {number: encoder.encode_sparse(x)}
        assert_equal(transcoders.decode(number, given, x), layer.reconstruct(x))


@pytest.mark.parametrize("case", ["clt_relu", "relu", "gemma_scope", "gemma_scope_2"])
def test_rows_come_in_the_order_asked_for_however_they_are_asked_for(case: str) -> None:
    transcoders = many(GOLDEN / "circuit_tracer" / case)
    whole = transcoders.decoder_rows(1, 1)
    n = len(whole)
    for asked in ([n - 1, 0, 1, 2, 2, 5], [], [4], list(range(n))):
        expected = whole[torch.tensor(asked, dtype=torch.int64)]
        assert torch.equal(transcoders.decoder_rows(1, 1, asked), expected)
        assert torch.equal(transcoders.decoder_rows(1, 1, torch.tensor(asked, dtype=torch.int64)), expected)
    for part in (slice(2, 7), slice(None, None, 3), slice(5, 2), slice(-3, None)):
        assert torch.equal(transcoders.decoder_rows(1, 1, part), whole[part])


def test_features_and_targets_that_are_not_there_are_refused_by_name() -> None:
    transcoders = many(GOLDEN / "circuit_tracer" / "clt_relu")
    with pytest.raises(DictionaryError, match="features of layer 2 write at layers 2 to 3, not at 1"):
        transcoders.decoder_rows(2, 1)
    with pytest.raises(DictionaryError, match="layer 0 has features 0 to 17; asked for 3 to 18"):
        transcoders.decoder_rows(0, 1, [3, 18])
    with pytest.raises(DictionaryError, match="layers 0 to 3; layer 4"):
        transcoders.encoder(4)
    with pytest.raises(DictionaryError, match="is a cross-layer set"):
        transcoders.layer(0)
    with pytest.raises(DictionaryError, match=r"features of layers \[0, 2\] are needed too"):
        transcoders.decode(2, {1: Sparse.from_dense(torch.zeros(2, 18))})


def test_a_skip_connection_takes_the_activations() -> None:
    transcoders = many(GOLDEN / "circuit_tracer" / "skip")
    features = {0: transcoders.encoder(0).encode_sparse(torch.ones(2, 8))}
    with pytest.raises(DictionaryError, match="decode takes the activations too"):
        transcoders.decode(0, features)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_are_read_as_safetensors_wrote_them(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    tensors = {
        "matrix": (torch.randn(11, 6) * 100).to(dtype),
        "cube": (torch.randn(5, 4, 3) * 100).to(dtype),
        "number": torch.tensor(3).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = safetensors_headers(tmp_path / "x.safetensors")
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        assert stored[name].read().dtype == dtype
        assert torch.equal(stored[name].read(), tensor)
    assert torch.equal(stored["matrix"].T.read(), tensors["matrix"].T)
    some = torch.tensor([5, 0, 4, 4])
    assert torch.equal(stored["matrix"].T.rows(some), tensors["matrix"].T[some])
    assert torch.equal(stored["matrix"].rows(some), tensors["matrix"][some])
    assert torch.equal(stored["cube"].rows(slice(1, 4), 2), tensors["cube"][1:4, 2])


def header(text: str, data: int = 64) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02\x03",
        struct.pack("<Q", 2**62) + b"{}",
        header("not json"),
        header("[]"),
        header('{"W": 3}'),
        header('{"W": {"dtype": "F32", "shape": [4]}}'),
        header('{"W": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}'),
        header('{"W": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}'),
        header('{"W": {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]}}'),
        header('{"W": {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}}'),
        header('{"W": {"dtype": "F32", "shape": [true, 4], "data_offsets": [0, 16]}}'),
        header('{"W": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}'),
        header('{"W": {"dtype": "F32", "shape": [17], "data_offsets": [0, 68]}}'),
        header('{"W": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 64]}}'),
        header("[" * 100_000),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DictionaryError, match=r"x\.safetensors"):
        safetensors_headers(tmp_path / "x.safetensors")
