"""Hugging Face directories: every kind of file, and every kind of mistake."""

import builtins
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, equal, fails
from safetensors.numpy import load_file, save_file

import models
from models.checkpoint import Skeleton, parameters_of
from models.tables import MODEL_TYPES, expand

HUGGINGFACE = {
    "model_type": "opt",
    "vocab_size": 97,
    "hidden_size": 35,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "ffn_dim": 53,
    "max_position_embeddings": 41,
    "word_embed_proj_dim": 35,
}
LLAMA_LIKE = {  # for every model type that is built like a Llama, and Gemma
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 53,
    "max_position_embeddings": 41,
    "rms_norm_eps": 1e-5,
}
INDEX = "model.safetensors.index.json"


def tensors(seed=0, dtype=np.float32, config=HUGGINGFACE):
    """Random tensors, named and shaped as Hugging Face does."""
    family, table = MODEL_TYPES[config["model_type"]]
    ours = family.from_huggingface(config, "tiny")
    shapes = Skeleton(ours, "float32").shapes
    rng = np.random.default_rng(seed)
    return {
        name if name.startswith("lm_head") else f"model.{name}": rng.normal(size=place.shape(shapes)).astype(dtype)
        for name, place in expand(table, shapes, ours.layers).items()
    }


@pytest.fixture
def directory(tmp_path):
    """A Hugging Face directory, to be changed."""
    (tmp_path / "config.json").write_text(json.dumps(HUGGINGFACE))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def llama(tmp_path):
    """A function that writes a Hugging Face directory of a model type, with random tensors or those given."""

    def write(model_type="llama", given=None, dtype=np.float32, **fields):
        config = LLAMA_LIKE | {"model_type": model_type} | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors(dtype=dtype, config=config) if given is None else given, tmp_path / "model.safetensors")
        return tmp_path

    return write


def rewrite(directory, **changes):
    """Change tensors by name; None leaves one out."""
    new = load_file(directory / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in new.items() if tensor is not None}, directory / "model.safetensors")


def shard(directory, files=2):
    """The same weights in several files with an index."""
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: whole[name] for name in sorted(whole)[number::files]}
        save_file(part, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


# --- Hugging Face directories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 2, 3])
def test_sharded_equals_whole(directory, files):
    whole = models.load(directory)
    shard(directory, files)
    assert equal(models.load(directory), whole)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "float16"), (jnp.dtype("bfloat16"), "bfloat16")])
def test_dtypes_of_files(directory, dtype, name):
    save_file(tensors(dtype=dtype), directory / "model.safetensors")
    model = models.load(directory)
    assert model.shape.dtype == name
    kernel = parameters_of(model)["layers.0.feed_forward.up.kernel"]
    np.testing.assert_array_equal(np.asarray(kernel), tensors(dtype=dtype)["model.decoder.layers.0.fc1.weight"].T)
    wide = parameters_of(models.load(directory, dtype="float32"))["layers.0.feed_forward.up.kernel"]
    np.testing.assert_array_equal(wide, np.asarray(kernel).astype(np.float32))


def test_fused_tensors_equal_split_ones(llama):
    split = tensors(config=LLAMA_LIKE | {"model_type": "llama"})
    separate = models.load(llama("llama", split))
    fused = {
        name: tensor for name, tensor in split.items() if "_proj" not in name or "o_proj" in name or "down" in name
    }
    for layer in range(2):
        at = f"model.layers.{layer}"
        heads = [split[f"{at}.self_attn.{part}_proj.weight"] for part in "qkv"]
        fused[f"{at}.self_attn.qkv_proj.weight"] = np.concatenate(heads)
        halves = [split[f"{at}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        fused[f"{at}.mlp.gate_up_proj.weight"] = np.concatenate(halves)
    path = llama("phi3", fused)
    assert equal(models.load(path), separate)
    shard(path, 3)
    assert equal(models.load(path), separate)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3", "gemma"])
def test_every_tensor_of_a_family_is_read(llama, model_type):
    fields = {"head_dim": 14} if model_type in ("qwen3", "gemma") else {}
    path = llama(model_type, **fields)
    given = load_file(path / "model.safetensors")
    read = parameters_of(models.load(path))
    assert sum(value.size for value in read.values()) == sum(tensor.size for tensor in given.values())
    numbers = np.sort(np.concatenate([np.asarray(value).ravel() for value in read.values()]))
    np.testing.assert_array_equal(numbers, np.sort(np.concatenate([tensor.ravel() for tensor in given.values()])))


TABLES = {"opt": "model.decoder.embed_tokens.weight", "llama": "model.embed_tokens.weight"}


@pytest.mark.parametrize("model_type", ["opt", "llama", "phi3", "gemma"])
def test_heads_of_tied_models(llama, model_type):
    """The table once more is tied, alone it is the table, and a head of its own is one, whatever the file says."""
    fields = HUGGINGFACE if model_type == "opt" else LLAMA_LIKE | {"head_dim": 14}
    fields = fields | {"model_type": model_type, "tie_word_embeddings": True}
    write, table = functools.partial(llama, **fields), TABLES.get(model_type, TABLES["llama"])
    given = tensors(config=fields)
    plain = models.load(write(given=given))
    assert plain.config.tied and plain.shape.tied and "lm_head.weight" not in given
    assert equal(models.load(write(given=given | {"lm_head.weight": given[table]})), plain)
    alone = {"lm_head.weight" if name == table else name: tensor for name, tensor in given.items()}
    assert equal(models.load(write(given=alone)), plain)
    head = given[table] + np.eye(*given[table].shape, dtype=np.float32)
    path = write(given=given | {"lm_head.weight": head})
    own = models.load(path)
    assert not own.config.tied and not models.read_shape(path).tied
    np.testing.assert_array_equal(parameters_of(own)["head.embedding"], head)
    np.testing.assert_array_equal(parameters_of(own)["tokens.embedding"], given[table])
    ids = jax.device_put(np.array([[5, 6, 7]]))
    assert np.abs(jax.device_get(own(ids)) - jax.device_get(plain(ids))).max() > 0.01
    models.save(own, path / "ours")
    assert equal(models.load(path / "ours"), own)


def test_a_head_that_is_not_tied_must_be_there(llama):
    fails(
        llama("llama", tensors(config=LLAMA_LIKE | {"model_type": "llama", "tie_word_embeddings": True})),
        "missing lm_h",
    )


def test_buffers_of_older_files_are_left_out(llama):
    plain = models.load(llama("llama", dtype=np.float16))
    given = tensors(dtype=np.float16, config=LLAMA_LIKE | {"model_type": "llama"})
    for name in ("model.rotary_emb", "model.layers.0.self_attn.rotary_emb"):
        given[f"{name}.inv_freq"] = np.ones(4, np.float32)
    loaded = models.load(llama("llama", given))
    assert loaded.shape.dtype == "float16" and equal(loaded, plain)


# In a process of its own, since this one may have held more before. VmHWM is the most that it ever held, in KiB.
MEASURE = """
import jax, pathlib, sys, models

def peak():
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

jax.device_put(0).block_until_ready()
before = peak()
model = models.load(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux how much memory was held")
def test_loading_holds_no_more_than_the_weights_and_a_file(llama):
    sizes = {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 2048}
    files, path = 4, llama("llama", dtype=np.float16, **sizes)
    whole = (path / "model.safetensors").stat().st_size
    shard(path, files)
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent.parent)
    assert whole < int(done.stdout) < whole * (1 + 2 / files)  # a file, a tensor, and what the allocator wastes


def test_names_without_the_prefix_and_with_the_tied_head(directory):
    whole = models.load(directory)
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors().items()}
    save_file(plain | {"lm_head.weight": plain["decoder.embed_tokens.weight"]}, directory / "model.safetensors")
    assert equal(models.load(directory), whole)


def test_straight_to_its_sharding(directory):
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model = models.load(directory, sharding=lambda name, shape: host if name.startswith("layers.1.") else device)
    for name, value in parameters_of(model).items():
        assert value.sharding == (host if name.startswith("layers.1.") else device)
    cast = parameters_of(models.load(directory, dtype="bfloat16", sharding=host))["tokens.embedding"]
    assert cast.sharding == host and cast.dtype == jnp.bfloat16
    assert parameters_of(models.create(CONFIG, sharding=host))["tokens.embedding"].sharding == host
    models.save(model, directory / "ours")
    loaded = models.load(directory / "ours", sharding=host)
    assert all(value.sharding == host for value in parameters_of(loaded).values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["whole", "sharded", "parameters", "before torch 1.6"])
def test_torch_files(directory, dtype, layout):
    torch = pytest.importorskip("torch", reason="reads torch's own files")
    whole = models.load(directory, dtype=dtype)
    given = {name: torch.from_numpy(tensor).to(getattr(torch, dtype)) for name, tensor in tensors().items()}
    (directory / "model.safetensors").unlink()
    if layout == "sharded":
        names = sorted(given)
        index = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(index.values()):
            torch.save({name: given[name] for name in names if index[name] == file}, directory / file)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        if layout == "parameters":  # as of named_parameters, which need gradients
            given = {name: torch.nn.Parameter(tensor) for name, tensor in given.items()}
        file = directory / "pytorch_model.bin"
        torch.save(given, file, _use_new_zipfile_serialization=layout != "before torch 1.6")
    assert equal(models.load(directory), whole)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_does_not_depend_on_its_file(llama, file):
    """jax may keep memory that it is given, which must not be the file's: what is written over it would be seen."""
    path = llama("llama", intermediate_size=512, vocab_size=4096)
    if file == "pytorch_model.bin":
        torch = pytest.importorskip("torch", reason="writes torch's own file")
        given = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        torch.save({name: torch.from_numpy(tensor) for name, tensor in given.items()}, path / file)
    model = models.load(path)
    before = {name: np.array(value) for name, value in parameters_of(model).items()}
    with (path / file).open("r+b") as opened:
        opened.write(b"\xff" * (path / file).stat().st_size)
    for name, value in parameters_of(model).items():
        np.testing.assert_array_equal(value, before[name])


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_torch_files_that_hold_code_are_refused(directory, capsys):
    torch = pytest.importorskip("torch", reason="writes torch's own files")
    (directory / "model.safetensors").unlink()
    torch.save({"model.decoder.embed_tokens.weight": Bomb()}, directory / "pytorch_model.bin")
    fails(directory, "holds more than tensors")
    torch.save({"model.decoder.embed_tokens.weight": 5}, directory / "pytorch_model.bin")
    fails(directory, "is a int; expected a tensor")
    torch.save({7: torch.ones(5)}, directory / "pytorch_model.bin")
    fails(directory, "holds a tensor named 7; expected a dict of tensors by name")
    file = directory / "pytorch_model.bin"
    torch.save({"decoder.x": torch.ones(500)}, file)
    file.write_bytes(file.read_bytes()[:-700])
    fails(directory, "pytorch_model.bin is damaged")
    assert "executed" not in capsys.readouterr().out


def test_torch_files_without_torch_name_the_remedy(directory, monkeypatch):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    real = builtins.__import__

    def without_torch(name, *rest, **options):
        if name == "torch":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    fails(directory, "torch is not installed; convert it to safetensors or `pip install torch`")


# --- mistakes ---------------------------------------------------------------------------------------------------------

BIAS = "model.decoder.layers.1.fc1.bias"
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.decoder.layers.2.fc1.bias", np.ones(53, np.float32), r"unknown decoder\.layers\.2\.fc1\.bias"),
        (BIAS, None, r"missing decoder\.layers\.1\.fc1\.bias"),
        (BIAS, np.ones(54, np.float32), r"layers\.1\.fc1\.bias has shape \[54\]; the configuration expects \[53\]"),
        (
            "model.decoder.layers.0.fc1.weight",  # transposed
            np.ones((35, 53), np.float32),
            r"fc1\.weight has shape \[35, 53\]; the configuration expects \[53, 35\]",
        ),
        (BIAS.removeprefix("model."), np.ones(53, np.float32), "fc1.bias is doubled"),
        (BIAS, np.ones(53, np.int8), "fc1.bias has dtype I8; expected one of float32"),
    ],
)
def test_tensors_that_do_not_fit(directory, name, tensor, message):
    rewrite(directory, **{name: tensor})
    fails(directory, message)


def test_misshapen_fused_tensor(llama):
    path = llama("phi3")
    rewrite(path, **{"model.layers.1.self_attn.qkv_proj.weight": np.ones((65, 32), np.float32)})
    fails(path, r"qkv_proj\.weight has shape \[65, 32\]; the configuration expects \[64, 32\]")


def test_the_index_says_which_shard_has_a_tensor(directory):
    """Another shard may hold an older copy of it."""
    whole = models.load(directory)
    shard(directory)
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    for file in directory.glob("model-*"):
        save_file(load_file(file) | ({} if index[BIAS] == file.name else {BIAS: np.ones(53, np.float32)}), file)
    assert equal(models.load(directory), whole)
    (directory / INDEX).write_text(
        json.dumps({"weight_map": index | {"model.decoder.x": "model-00001-of-00002.safetensors"}})
    )
    fails(directory, "has model.decoder.x in model-00001-of-00002.safetensors, which has it not")


def test_mixed_dtypes_must_be_decided(directory):
    rewrite(directory, **{BIAS: np.ones(53, np.float16)})
    fails(directory, "stores float16 and float32; say which with dtype=")
    assert models.load(directory, dtype="float16").shape.dtype == "float16"


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_file(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(directory, "model.safetensors is damaged or cut short")


def test_missing_shard(directory):
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    fails(directory, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json is damaged"),
        ("{}", "index.json is damaged"),
        ('{"weight_map": 3}', "index.json is damaged"),
        ('{"weight_map": {"a": "../../secret"}}', "expected names of files beside it"),
    ],
)
def test_damaged_index(directory, text, message):
    shard(directory)
    (directory / INDEX).write_text(text)
    fails(directory, message)


def test_shard_that_the_index_does_not_list(directory):
    shard(directory)
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    listed = {name: file for name, file in index.items() if "00001" in file}
    (directory / INDEX).write_text(json.dumps({"weight_map": listed}))
    fails(directory, "missing decoder.* and .* more; the configuration needs it")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            HUGGINGFACE | {"model_type": "mamba"},
            "'mamba'; .* one of opt, llama, mistral, qwen2, qwen3, phi3, gemma$",
        ),
        (HUGGINGFACE | {"enable_bias": False}, "config.json: OPT: enable_bias is False"),
        (LLAMA_LIKE | {"model_type": ["llama"]}, r"model_type is \['llama'\]; expected one of opt"),
        (LLAMA_LIKE | {"model_type": "llama", "_name_or_path": 3}, "_name_or_path is 3; expected text"),
        (
            LLAMA_LIKE | {"model_type": "llama", "rms_norm_eps": "1e-5"},
            "rms_norm_eps is '1e-5'; expected a number betw",
        ),
        (
            LLAMA_LIKE | {"model_type": "gemma", "head_dim": 14, "rms_norm_eps": -1},
            "rms_norm_eps is -1; expected a num",
        ),
        (
            LLAMA_LIKE | {"model_type": "phi3", "rope_scaling": LONG},
            "phi3: rope scaling is 'longrope'; supported are def",
        ),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    fails(tmp_path, message)


def test_directories_that_are_not_models(directory):
    fails(directory / "nowhere", "nowhere is not a directory")
    (directory / "model.safetensors").unlink()
    fails(directory, "has no weights; expected model.safetensors")
    for text in ("{", "[" * 100_000, "1" * 5000):
        (directory / "config.json").write_text(text)
        fails(directory, "config.json is not JSON")
    (directory / "config.json").unlink()
    fails(directory, "has no config.json")
