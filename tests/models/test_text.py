"""Text as transformers reads and writes it: ids, texts and stops of tiny checkpoints of every family, and chats."""

import itertools
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

import models
from experiments import generate
from models import CheckpointError, load_text

torch = pytest.importorskip("torch", reason="the reference needs torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")
torch.set_num_threads(1)

VOCAB, NEW = 600, 11
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["Return the", "is  a b", "é is"]
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 53, "num_key_value_heads": 2}
FAMILIES = {
    "OPT": {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 53, "word_embed_proj_dim": 19},
    "Llama": SIZES,
    "Mistral": SIZES | {"sliding_window": 7},
    "Qwen2": SIZES,
    "Qwen3": SIZES | {"head_dim": 14},
    "Phi3": SIZES,
    "Gemma": SIZES | {"head_dim": 14},
}
HEADS = ("tied", "own head", "head alone")
ENDS = ("int", "list", "none", "in generation_config only")
DECODERS = ("Strip", "ByteLevel", "Metaspace")
BEGINS = (True, False)
CASES = [  # of 504, such that every two choices meet
    (family, ends, HEADS[(i + j) % 3], DECODERS[(i + 2 * j) % 3], BEGINS[(i + j) % 2])
    for (i, family), (j, ends) in itertools.product(enumerate(FAMILIES), enumerate(ENDS))
]


def test_every_two_choices_meet():
    for one, other in itertools.combinations(zip(*CASES), 2):
        assert set(zip(one, other)) == set(itertools.product(set(one), set(other)))


def tokenizer_of(decoder: str, begins: bool) -> Tokenizer:
    """One with bytes, letters and many words that begin with a space; with Strip as that of Llama 2."""
    space = "Ġ" if decoder == "ByteLevel" else "▁"
    one = [*sorted(pre_tokenizers.ByteLevel.alphabet())] if decoder == "ByteLevel" else [*LETTERS, "R", space]
    bytes_of = [] if decoder == "ByteLevel" else [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*one, *bytes_of, *(space + letter for letter in LETTERS)]
    words += [space + first + second for first, second in itertools.product(LETTERS, LETTERS)]
    words = words[: VOCAB - 3]
    vocab = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    merges = [(space, letter) for letter in LETTERS]
    made = Tokenizer(tokenizer_models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=decoder != "ByteLevel"))
    if decoder == "ByteLevel":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif decoder == "Metaspace":
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(steps)
    if begins:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert made.get_vocab_size() == VOCAB
    return made


def write_checkpoint(path: Path, family: str, ends: str, head: str, decoder: str, begins: bool) -> None:
    """A random model with its tokenizer. What ends texts is a token that comes in them."""
    torch.manual_seed(sum(map(ord, family)))
    own = head == "own head"
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": VOCAB, "num_hidden_layers": 1, "max_position_embeddings": 41, "tie_word_embeddings": not own},
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
        **FAMILIES[family],
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    tokenizer = tokenizer_of(decoder, begins)
    free = model.generate(torch.tensor([tokenizer.encode(PROMPTS[0]).ids]), max_new_tokens=NEW, do_sample=False)
    end = int(free[0, -NEW + 4])
    eos = {"int": end, "list": [end, 599], "none": None, "in generation_config only": [end]}[ends]
    model.generation_config.eos_token_id = eos
    if ends != "in generation_config only":
        model.config.eos_token_id = eos
    model.save_pretrained(path)
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    table = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    if head == "own head" and family in ("OPT", "Llama", "Gemma"):  # whatever the configuration says
        (path / "config.json").write_text(
            json.dumps(json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True})
        )
    if head == "head alone":
        tensors["lm_head.weight"] = tensors.pop(table)
    save_file(tensors, weights, metadata={"format": "pt"})
    # Its name says that this token ends texts, which is for those only that say so in numbers.
    named = {"bos_token": "<s>", "eos_token": tokenizer.id_to_token(end) if ends == "none" else "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(path)


@pytest.mark.parametrize(("family", "ends", "head", "decoder", "begins"), CASES)
def test_ids_texts_and_stops_equal(tmp_path, family, ends, head, decoder, begins):
    write_checkpoint(tmp_path, family, ends, head, decoder, begins)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    model, text = generate.load(tmp_path)
    greedy = generate.Sampling()
    run = generate.continue_prompts(
        model, text, PROMPTS, plan="device", max_new_tokens=NEW, sampling=greedy, check=False
    )
    stopped = 0
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        assert text.encode(prompt) == ids and (ids[0] == 1) == begins
        sequence = theirs.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0].tolist()
        assert run.continuations[number] == sequence[len(ids) :]
        whole = tokenizer.decode(sequence, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) + run.texts[number] == whole
        stopped += len(sequence) < len(ids) + NEW
    assert bool(stopped) == (ends != "none")


def test_a_text_goes_on_after_half_a_character():
    """Whose bytes are in the prompt and the continuation, and in bytes that a tokenizer falls back to."""
    bytes_of = "aé😀b".encode()
    text = models.TextProcessor(models.byte_tokenizer())
    for cut in range(len(bytes_of) + 1):
        before, new = list(bytes_of[:cut]), list(bytes_of[cut:])
        told = bytes_of[:cut].decode(errors="ignore")
        assert told + text.decode(new, before) == "aé😀b"
    llama = models.TextProcessor(tokenizer_of("Strip", False))
    ids = llama.encode("is é")
    assert len(ids) == 5  # two of them the bytes of the last character
    assert llama.decode(ids[4:], ids[:4]) == "é" and llama.decode(ids[2:], ids[:2]) == " é"


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Writes files of a checkpoint, JSON but for what is text; gives the directory."""

    def write(**contents):
        for name, content in contents.items():
            name = name.replace("_json", ".json").replace("_jinja", ".jinja")
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    tokenizer_of("Strip", True).save(str(tmp_path / "tokenizer.json"))
    return write


@pytest.mark.parametrize(
    ("contents", "ids"),
    [
        ({}, ()),  # a token's name means nothing
        ({"tokenizer_config_json": {"eos_token": "</s>"}}, (2,)),
        ({"tokenizer_config_json": {"eos_token": {"content": "</s>", "lstrip": False}}}, (2,)),
        ({"special_tokens_map_json": {"eos_token": "</s>"}}, (2,)),
        ({"tokenizer_config_json": {"eos_token": "<none>"}}, ()),
        ({"tokenizer_config_json": {"eos_token": "</s>"}, "config_json": {"eos_token_id": 7}}, (7,)),
        ({"tokenizer_config_json": {"eos_token": "</s>"}, "config_json": {"eos_token_id": None}}, ()),
        ({"config_json": {"eos_token_id": 7}, "generation_config_json": {"eos_token_id": [5, 3]}}, (5, 3)),
        ({"config_json": {"eos_token_id": 7}, "generation_config_json": {"pad_token_id": 4}}, (7,)),
    ],
)
def test_what_ends_a_text(files, contents, ids):
    text = load_text(files(**contents))
    assert text.eos_token_ids == ids
    assert text.pad_token_id == (4 if "pad_token_id" in str(contents) else (*ids, 0)[0])


def test_what_a_tokenizer_did_in_training_is_forgotten(files):
    path = files()
    left = Tokenizer.from_file(str(path / "tokenizer.json"))
    left.enable_truncation(3)
    left.enable_padding(length=3)
    left.save(str(path / "tokenizer.json"))
    for prompt in ("i", "return the"):
        expected = transformers.PreTrainedTokenizerFast.from_pretrained(path)(prompt)["input_ids"]
        assert load_text(path).encode(prompt) == models.load_tokenizer(path).encode(prompt).ids == expected
        assert len(expected) != 3


def test_tokens_that_are_named_are_special(files):
    path = files(tokenizer_config_json={"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    theirs, text = transformers.PreTrainedTokenizerFast.from_pretrained(path), load_text(path)
    for prompt in ("is</s>is", "</s>", "<s>is"):
        assert text.encode(prompt) == theirs(prompt)["input_ids"]
    assert text.decode([3, 2]) == theirs.decode([3, 2], skip_special_tokens=True) == "a"


@pytest.mark.parametrize(
    ("file", "stated", "sampling"),
    [
        ("generation_config_json", {"temperature": 0.6, "do_sample": True}, (True, 0.6, 50, 1.0)),
        ("generation_config_json", {"top_p": 0.8, "top_k": None}, (False, 1.0, 50, 0.8)),
        ("generation_config_json", {"do_sample": False, "temperature": 0.0}, (False, 0.0, 50, 1.0)),
        ("config_json", {"do_sample": True, "top_k": 7}, (True, 1.0, 7, 1.0)),
        ("generation_config_json", {"eos_token_id": 2}, ()),
    ],
)
def test_sampling_that_is_stated(files, file, stated, sampling):
    """Completed as transformers does."""
    path = files(**{file: stated})
    assert tuple(load_text(path).sampling.values()) == sampling
    if sampling and file == "generation_config_json":
        theirs = transformers.GenerationConfig.from_pretrained(path)
        completed = {**theirs._get_default_generation_params(), **{k: v for k, v in stated.items() if v is not None}}
        assert load_text(path).sampling == {name: completed[name] for name in models.text.SAMPLING}


def test_what_is_not_supported_is_told(files):
    stated = {"repetition_penalty": 1.1, "num_beams": 1, "typical_p": 1.0, "min_p": None, "stop_strings": ["."]}
    assert load_text(files(generation_config_json=stated)).unsupported == {
        "repetition_penalty": 1.1,
        "stop_strings": ["."],
    }


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"generation_config_json": {"eos_token_id": "2"}},
            "generation_config.json: eos_token_id is '2'; expected a token id",
        ),
        ({"generation_config_json": {"eos_token_id": [2, None]}}, r"eos_token_id is \[2, None\]"),
        ({"config_json": {"eos_token_id": 2**40}}, r"/config.json: eos_token_id is 1099511627776"),
        ({"config_json": {"pad_token_id": True}}, "pad_token_id is True"),
        ({"generation_config_json": {"do_sample": "yes"}}, "do_sample is 'yes'; expected true or false"),
        ({"generation_config_json": {"do_sample": True, "temperature": "hot"}}, "json: temperature is 'hot'"),
        ({"generation_config_json": {"do_sample": True, "top_p": 7}}, "json: top_p is 7"),
        ({"generation_config_json": "[" * 100_000}, "generation_config.json is not JSON"),
        ({"tokenizer_config_json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config_json": "[]"}, "tokenizer_config.json holds a list; expected a JSON object"),
        ({"tokenizer_config_json": {"eos_token": 5}}, "eos_token is 5; expected text"),
        ({"tokenizer_config_json": {"eos_token": "\ud800"}}, "eos_token is '.ud800'; expected text"),
        ({"tokenizer_config_json": {"chat_template": 5}}, "chat_template is 5; expected text"),
        ({"tokenizer_json": "[" * 100_000}, "tokenizer.json: not a readable tokenizer"),
    ],
)
def test_files_that_mean_nothing(files, contents, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        load_text(files(**contents))
    assert "\n" not in str(raised.value)


# --- chats ------------------------------------------------------------------------------------------------------------

LLAMA_2 = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' %}{% if loop.index0 % 2 %}{{ raise_exception('roles must alternate') }}{% endif %}
[INST] {{ message['content'].strip() }} [/INST]{% else %} {{ message.content | trim }} {{ eos_token }}{% endif %}
{% endfor %}"""
CHAT_ML = """{%- set ns = namespace(last=none) -%}
{% for message in messages %}{% set ns.last = message['role'] %}
{% if message.content is not defined %}{% continue %}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}

{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{{ {'é': [ns.last, '<', dict(a=1)]} | tojson(indent=2) }}
{% if add_generation_prompt %}<|im_start|>assistant{{ strftime_now('%Y') | length }}{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "is <b>", "name": None},
    {"role": "assistant", "content": None},
    {"role": "user", "content": "  Return the é\n"},
]


@pytest.mark.parametrize("template", [LLAMA_2, CHAT_ML])
@pytest.mark.parametrize("place", ["chat_template_jinja", "tokenizer_config_json", "one of several"])
def test_chats_are_those_of_transformers(files, template, place):
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if place == "chat_template_jinja":
        path = files(tokenizer_config_json=tokens | {"chat_template": "not this"}, chat_template_jinja=template)
    else:
        several = [{"name": "tool_use", "template": "not this"}, {"name": "default", "template": template}]
        given = template if place == "tokenizer_config_json" else several
        path = files(tokenizer_config_json=tokens | {"chat_template": given})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert load_text(path).encode_chat(MESSAGES) == expected and len(expected) > 20
    if template == LLAMA_2:  # the token that begins a text comes from the template, once
        assert expected[0] == 1 and expected[1] != 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LLAMA_2, r"the chat template does not take the messages \(roles must alternate\)"),
        ("{% if %}", "does not take the messages"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% include 'etc' %}", "does not take"),
        ("{{ 1 / 0 }}", "division by zero"),
        (None, "the checkpoint has no chat template; expected a chat_template.jinja"),
    ],
)
def test_chats_that_are_refused(files, template, message):
    text = load_text(files(**({} if template is None else {"chat_template_jinja": template})))
    with pytest.raises(ValueError, match=message):
        text.encode_chat([{"role": "assistant", "content": ""}, {"role": "user", "content": "is"}])
