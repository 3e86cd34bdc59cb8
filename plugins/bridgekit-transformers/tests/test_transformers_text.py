import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from bridgekit_transformers.text import pool
from torch import Tensor

from bridgekit.errors import BridgekitError, ItemError, PluginError
from bridgekit.plugins import load_encoder
from bridgekit.testing import check_encoder

Tiny = Callable[..., Path]
TEXTS = ["a dog", "a very much longer text about a cat, a dog and 3 birds", "x", "é漢 and a fox"]


def vectors(name: str, texts: Sequence[str] = TEXTS) -> Tensor:
    encoder = load_encoder(f"transformers:{name}", "cpu")
    return encoder.encode([encoder.prepare(text) for text in texts])


def states(folder: Path, text: str, limit: int, model: str = "AutoModel", layer: int | None = None) -> Tensor:
    """The model's last states of one text alone, or those behind a layer, (t, d), by transformers' own tokenizer and call."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        outputs = getattr(transformers, model).from_pretrained(folder)(**inputs, output_hidden_states=layer is not None)
    found = outputs.last_hidden_state[0] if layer is None else outputs.hidden_states[layer][0]
    assert isinstance(found, Tensor)
    return found


def assert_same(found: Tensor, expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(found, torch.stack(list(expected)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "model"), [("bert", "AutoModel"), ("roberta", "AutoModel"), ("t5", "T5EncoderModel")])
def test_an_encoder_without_further_files_is_pooled_by_the_mean_over_a_texts_tokens(tiny: Tiny, kind: str, model: str) -> None:
    folder = tiny(kind)
    assert_same(vectors(str(folder)), [states(folder, text, 48, model).mean(0) for text in TEXTS])


def test_a_decoder_only_model_is_pooled_by_its_last_token(tiny: Tiny) -> None:
    folder = tiny("llama")
    assert_same(vectors(str(folder)), [states(folder, text, 48)[-1] for text in TEXTS])


def test_a_bge_like_repository_gives_its_class_token_at_length_1(tiny: Tiny) -> None:
    expected = [states(tiny("bge"), text, 20)[0] for text in TEXTS]
    assert_same(vectors(str(tiny("bge"))), [vector / vector.norm() for vector in expected])


def test_an_e5_like_repository_puts_its_default_prompt_before_each_text(tiny: Tiny) -> None:
    expected = [states(tiny("e5"), f"passage: {text}", 20).mean(0) for text in TEXTS]
    assert_same(vectors(str(tiny("e5"))), [vector / vector.norm() for vector in expected])


@pytest.mark.parametrize(
    ("asked", "before"),
    [("query", "query: "), ("", ""), ("find this: ", "find this: "), ("a picture, say of ", "a picture, say of ")],
)
def test_a_prompt_is_chosen_by_name_or_written_out(tiny: Tiny, asked: str, before: str) -> None:
    expected = [states(tiny("e5"), before + text, 20).mean(0) for text in TEXTS]
    assert_same(vectors(f"{tiny('e5')},prompt={asked}"), [vector / vector.norm() for vector in expected])


def test_a_prompt_of_a_name_that_the_repository_lacks_is_refused_with_those_it_has(tiny: Tiny) -> None:
    with pytest.raises(BridgekitError, match="'qurey'") as caught:
        load_encoder(f"transformers:{tiny('e5')},prompt=qurey", "cpu")
    assert "query, passage" in str(caught.value.remedy)


def test_poolings_are_joined_and_go_through_the_dense_layer_of_the_repository(tiny: Tiny) -> None:
    from safetensors.torch import load_file

    dense = load_file(tiny("dense") / "2_Dense" / "model.safetensors")
    expected = []
    for text in TEXTS:
        found = states(tiny("dense"), text, 20)
        joined = torch.cat([found[0], found.max(0).values, found.mean(0)])
        vector = torch.tanh(dense["linear.weight"] @ joined + dense["linear.bias"])
        expected.append(vector / vector.norm())
    assert_same(vectors(str(tiny("dense"))), expected)


def test_pooling_can_be_chosen(tiny: Tiny) -> None:
    found = states(tiny("bert"), TEXTS[1], 48)
    t = len(found)
    expected = {
        "cls": found[0],
        "max": found.max(0).values,
        "lasttoken": found[-1],
        "mean_sqrt_len_tokens": found.sum(0) / math.sqrt(t),
        "weightedmean": sum(found[place] * (place + 1) for place in range(t)) / (t * (t + 1) / 2),
    }
    for pooling, vector in expected.items():
        assert_same(vectors(f"{tiny('bert')},pooling={pooling}")[1:2], [vector])


@pytest.mark.parametrize("pooling", ["mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", "cls"])
def test_no_pooling_sees_the_padding(pooling: str) -> None:
    found = torch.randn(1, 5, 4)
    own = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(pool(found, own, pooling), pool(found[:, :3], own[:, :3], pooling))


@pytest.mark.parametrize(
    ("kind", "limit", "model", "prompt"),
    [
        ("bert", 48, "AutoModel", ""),
        ("roberta", 48, "AutoModel", ""),
        ("t5", 48, "T5EncoderModel", ""),
        ("llama", 48, "AutoModel", ""),
        ("fnet", 48, "AutoModel", ""),
        ("e5", 20, "AutoModel", "passage: "),
        ("dense", 20, "AutoModel", ""),
    ],
)
def test_an_earlier_layer_is_averaged_over_a_texts_tokens_beside_the_last(
    tiny: Tiny, kind: str, limit: int, model: str, prompt: str
) -> None:
    folder = tiny(kind)
    expected = [
        torch.cat([states(folder, prompt + text, limit, model, layer=1).mean(0), last])
        for text, last in zip(TEXTS, vectors(str(folder)), strict=True)
    ]
    assert_same(vectors(f"{folder},layers=1+last"), expected)
    assert_same(vectors(f"{folder},layers=1"), [vector[:32] for vector in expected])


def test_the_last_layer_alone_is_the_model_without_the_option(tiny: Tiny) -> None:
    plain = load_encoder(f"transformers:{tiny('e5')}", "cpu")
    for layer in ("last", "2"):
        encoder = load_encoder(f"transformers:{tiny('e5')},layers={layer}", "cpu")
        assert encoder.revision == plain.revision
        assert torch.equal(encoder.encode([encoder.prepare(TEXTS[0])]), plain.encode([plain.prepare(TEXTS[0])]))


@pytest.mark.parametrize("asked", ["0", "3", "first", "1+1", "2+last", ""])
def test_layers_that_the_model_lacks_are_refused(tiny: Tiny, asked: str) -> None:
    with pytest.raises(BridgekitError, match="the model has no layers") as caught:
        load_encoder(f"transformers:{tiny('bert')},layers={asked}", "cpu")
    assert "from 1 to 2" in str(caught.value.remedy)


def test_hidden_states_are_kept_only_where_they_are_needed(tiny: Tiny) -> None:
    asked = []
    for options in ("", ",layers=last", ",layers=1+last"):
        encoder: Any = load_encoder(f"transformers:{tiny('bert')}{options}", "cpu")
        hook = encoder._model.register_forward_pre_hook(
            lambda module, arguments, named: asked.append(named.get("output_hidden_states", False)), with_kwargs=True
        )
        encoder.encode([encoder.prepare(text) for text in TEXTS])
        hook.remove()
    assert asked == [False, False, True], "one forward pass for all texts each time"


def test_what_lies_beyond_the_longest_text_does_not_count(tiny: Tiny) -> None:
    encoder = load_encoder(f"transformers:{tiny('roberta')}", "cpu")
    long = "a b c d e " * 40
    assert len(encoder.prepare(long)) == 48  # 50 positions, of which RoBERTa leaves two out
    torch.testing.assert_close(vectors(str(tiny("roberta")), [long]), vectors(str(tiny("roberta")), [long + "z"]))


def test_many_threads_prepare_the_same_as_one(tiny: Tiny) -> None:
    encoder = load_encoder(f"transformers:{tiny('bge')}", "cpu")
    texts = [f"text {number} " * (1 + number % 30) for number in range(300)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(encoder.prepare, texts)) == [encoder.prepare(text) for text in texts]


def test_a_model_that_mixes_tokens_with_its_padding_gets_texts_of_one_length_together(tiny: Tiny) -> None:
    alone = torch.cat([vectors(str(tiny("fnet")), [text]) for text in TEXTS])
    torch.testing.assert_close(vectors(str(tiny("fnet"))), alone, atol=1e-5, rtol=1e-4)


def test_a_text_model_keeps_the_contract(tiny: Tiny) -> None:
    for options in ("", ",layers=1+last"):
        changed = f"transformers:{tiny('e5', seed=1)}{options}"
        check_encoder(f"transformers:{tiny('e5')}{options}", TEXTS, ["", "  \n"], changed=changed)


def test_a_blank_text_fails_alone(tiny: Tiny) -> None:
    with pytest.raises(ItemError, match="empty"):
        load_encoder(f"transformers:{tiny('bert')}", "cpu").prepare(" \n")


def test_a_tokenizer_in_python_is_as_safe_in_threads_and_is_cut_at_the_same_limit(tiny: Tiny) -> None:
    encoder = load_encoder(f"transformers:{tiny('byt5')}", "cpu")
    texts = [f"text {number} " * (1 + number % 7) for number in range(100)]
    with ThreadPoolExecutor(8) as threads:
        prepared = list(threads.map(encoder.prepare, texts))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("byt5"))
    assert prepared == [tokenizer(text.strip(), truncation=True, max_length=48)["input_ids"] for text in texts]
    assert max(map(len, prepared)) == 48
    assert_same(vectors(str(tiny("byt5"))), [states(tiny("byt5"), text, 48, "T5EncoderModel").mean(0) for text in TEXTS])


@pytest.mark.parametrize(
    ("modules", "pooling", "match"),
    [
        (["Transformer", "Pooling", "LSTM"], {}, "module 2 of modules.json, LSTM"),
        (["Transformer", "Pooling"], {"pooling_mode": "attention"}, "the pooling 'attention'"),
        (["Transformer", "Pooling"], {"include_prompt": False}, "without the prompt"),
        (["CLIPModel"], {}, "module 0 of modules.json, CLIPModel"),
        (["custom_code.Transformer"], {}, "custom modules"),
    ],
)
def test_a_repository_with_unsupported_modules_is_refused(
    tmp_path: Path, modules: list[str], pooling: dict[str, object], match: str
) -> None:
    tiny_models.build("bert", tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    tiny_models.write_json(tmp_path / "1_Pooling" / "config.json", pooling)
    listed = [
        {
            "path": "1_Pooling" if name == "Pooling" else "",
            "type": name if "." in name else f"sentence_transformers.models.{name}",
        }
        for name in modules
    ]
    tiny_models.write_json(tmp_path / "modules.json", listed)
    with pytest.raises(PluginError, match=match):
        load_encoder(f"transformers:{tmp_path}", "cpu")


@pytest.mark.parametrize(
    ("kind", "place", "named"),
    [
        ("CLIPModel", "0_CLIPModel", "CLIPModel in 0_CLIPModel"),
        ("Transformer", "0_Transformer", "Transformer in 0_Transformer"),
        ("StaticEmbedding", "", "StaticEmbedding"),
    ],
)
def test_a_sentence_model_without_a_transformer_of_its_own_is_refused_by_its_kind(
    tmp_path: Path, kind: str, place: str, named: str
) -> None:
    modules = [{"idx": 0, "name": "0", "path": place, "type": f"sentence_transformers.models.{kind}"}]
    tiny_models.write_json(tmp_path / "modules.json", modules)
    with pytest.raises(PluginError, match=f"sentence models that begin with {named}\n") as caught:
        load_encoder(f"transformers:{tmp_path}", "cpu")
    assert caught.value.remedy == "give the transformers model that it was made from, or another sentence model"


def test_the_names_that_newer_sentence_transformers_gives_its_modules_are_known(tmp_path: Path) -> None:
    tiny_models.build("bge", tmp_path)
    expected = vectors(str(tmp_path))
    modules = tiny_models.read_json(tmp_path / "modules.json")
    names = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling")
    for module, name in zip(modules, (*names, "sentence_transformer.modules.normalize.Normalize"), strict=True):
        module["type"] = f"sentence_transformers.{name}"
    tiny_models.write_json(tmp_path / "modules.json", modules)
    assert_same(vectors(str(tmp_path)), list(expected))


def test_the_vectors_are_those_of_sentence_transformers(tiny: Tiny, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    for kind in ("bge", "e5", "dense"):
        theirs = sentence_transformers.SentenceTransformer(str(tiny(kind)), device="cpu", local_files_only=True)
        expected = torch.from_numpy(theirs.encode(TEXTS))
        torch.testing.assert_close(vectors(str(tiny(kind))), expected, atol=1e-5, rtol=1e-4)
        theirs.save(str(tmp_path / kind))  # in the layout of the installed version
        torch.testing.assert_close(vectors(str(tmp_path / kind)), expected, atol=1e-5, rtol=1e-4)
