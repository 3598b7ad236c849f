"""Which heads copy: against transformers' own attention, layer by layer, a text and a row at a time."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)

import kvfold
from kvfold.probes.copying import copying_heads, lost_without_copies, random_words, read_with, repeated_text
from models import COMMON, PAGED, subject

PERIOD = 127  # of 512 positions at most, four times and one more


def passed_on(model, ids, silent=None):
    """What every layer passes on, and what it is made of; the attention of layer `silent` says nothing."""
    found = {"attention": {}, "layer": {}, "values": {}}

    def note(kind, index):
        def hook(_, args, output):
            states = output[0] if isinstance(output, tuple) else output
            found[kind][index] = states
            if kind == "attention":
                found["weights"] = {**found.get("weights", {}), index: output[1]}
                if index == silent:
                    return (torch.zeros_like(states), *output[1:])
            return None

        return hook

    hooks = []
    for index, layer in enumerate(model.model.layers):
        projection = getattr(layer.self_attn, "v_proj", None)
        if projection is not None:
            hooks.append(projection.register_forward_hook(note("values", index)))
        hooks += [
            layer.self_attn.register_forward_hook(note("attention", index)),
            layer.register_forward_hook(note("layer", index)),
        ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def hooks_of(model):
    return [(name, *module._forward_hooks) for name, module in model.named_modules() if module._forward_hooks]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_against_a_slow_loop(family):
    model = copy.deepcopy(subject(family)).eval()
    table = copying_heads(model)
    words = random_words(model, PERIOD, 0, model.config.vocab_size, (0, 1))
    assert not {0, 1} & set(words.tolist())
    ids = torch.cat([torch.tensor([1]), words.repeat(4)])[None]
    plain = copy.deepcopy(subject(family)).eval()
    plain.set_attn_implementation("eager")
    whole = passed_on(plain, ids)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(plain.model.layers)
    paged = [index for index, kind in enumerate(types) if kind == "full_attention"]
    assert len(table) == len(paged)
    for row, index in zip(table, paged, strict=True):
        less = passed_on(plain, ids, silent=index)
        before, after = (each["layer"][index][0, 1 + PERIOD :] for each in (whole, less))
        effect = ((before - after).norm(dim=-1) / before.norm(dim=-1)).mean()
        module = plain.model.layers[index].self_attn
        values = whole["values"][index][0].unflatten(-1, (2, -1)).repeat_interleave(2, 1)  # T Hq D
        weights, said = whole["weights"][index][0], whole["attention"][index][0]
        for group in range(2):
            shares = []
            for i in torch.linspace(1 + PERIOD, 4 * PERIOD, 64).long().tolist():
                copies = [j + behind for j in range(i - PERIOD, 0, -PERIOD) for behind in (0, 1)]
                assert all(ids[0, j] == ids[0, i] for j in copies[::2])
                left = weights[:, i].clone()
                left[2 * group : 2 * group + 2, copies] = 0.0
                left /= left.sum(-1, keepdim=True)
                with torch.no_grad():
                    without = module.o_proj(torch.einsum("ht,thd->hd", left, values).flatten())
                shares.append((without - said[i]).norm() / said[i].norm())
            expected = (effect * torch.stack(shares).mean()) ** 0.75
            for found in row[2 * group : 2 * group + 2]:
                torch.testing.assert_close(torch.tensor(found), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("family", [*PAGED, "gpt2", "qwen3-next"])
def test_every_family_is_probed(family):
    """Nothing of it stays: not a hook, not a changed number."""
    model = copy.deepcopy(subject(family)).eval()
    kvfold.Cache(model, "full")  # which leaves the one hook by which it knows that a pass has ended
    ids, hooks = torch.arange(2, 34)[None], hooks_of(model)
    with torch.no_grad():
        before = model(ids).logits
    table = torch.tensor(copying_heads(model))
    assert table.shape[1] == 4 and table.isfinite().all() and (table > 0).all() and len(table.unique()) > 1
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert hooks_of(model) == hooks


def test_attention_that_lies_deeper_in_its_layer():
    """DBRX keeps it a module further down: rows that enter a layer are the same all the same."""
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512, "vocab_size": 97}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=experts)).eval()
    kvfold.Cache(model, "full")  # which reads a few tokens of its own
    entered, left = [], []
    for block in model.transformer.blocks:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        block.register_forward_hook(lambda _, args, states: left.append(states))
    table = torch.tensor(copying_heads(model))
    assert len(entered) == 3 and all(torch.equal(*states) for states in entered)
    assert all(not torch.equal(*states) for states in left) and (table > 0).all()


def test_a_head_that_classifies_has_no_part_in_it():
    """Without a padding token it takes one row only."""
    plain = copy.deepcopy(subject("llama"))
    plain.config.pad_token_id = None
    model = LlamaForSequenceClassification(LlamaConfig(**{**COMMON, "pad_token_id": None}))
    model.model.load_state_dict(plain.model.state_dict())
    assert copying_heads(model) == copying_heads(plain)


def test_a_language_model_head_that_is_called_a_decoder():
    sizes = {name: COMMON[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
    config = ModernBertDecoderConfig(**sizes, **special, num_hidden_layers=4, num_attention_heads=4)
    table = torch.tensor(copying_heads(ModernBertDecoderForCausalLM(config).eval()))
    assert table.shape == (config.layer_types.count("full_attention"), 4) and (table > 0).all()


def test_layers_that_run_more_than_once():
    model = HrmTextForCausalLM(HrmTextConfig(**COMMON)).eval()
    with pytest.raises(ValueError, match="HrmTextForCausalLM does not run each of its attention modules once"):
        copying_heads(model)


def test_positions_without_room():
    model = copy.deepcopy(subject("llama"))
    model.config.max_position_embeddings = 4
    with pytest.raises(ValueError, match="4 positions have no room: say heads='even'"):
        copying_heads(model)


def test_nothing_stays_of_a_reading_that_fails():
    model = copy.deepcopy(subject("llama")).train()
    kvfold.Cache(model, "full")
    hooks, handle = hooks_of(model), model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        copying_heads(model)
    handle.remove()
    assert hooks_of(model) == hooks and all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights(dtype):
    found, exact = (torch.tensor(copying_heads(copy.deepcopy(subject("qwen3")).to(t))) for t in (dtype, torch.float32))
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.0)


def test_a_bias_of_the_projection_is_nobodys():
    model, found = copy.deepcopy(subject("llama-one-layer")).eval(), []
    text = repeated_text(random_words(model, 20, 0, model.config.vocab_size, (0, 1)), 1, 4)
    for bias in (None, torch.nn.Parameter(torch.linspace(-2.0, 2.0, 64))):
        model.model.layers[0].self_attn.o_proj.bias = bias
        read_with(model, text, lambda view: found.append(lost_without_copies(view, 20)))
    torch.testing.assert_close(found[0], found[1])


def test_the_text_is_read_once():
    model, passes = copy.deepcopy(subject("llama")), []
    model.train()
    frozen = model.model.layers[0].eval()
    model.register_forward_hook(lambda *_: passes.append([module.training for module in model.modules()]))
    with ThreadPoolExecutor(4) as pool:
        first, *again = pool.map(lambda _: kvfold.Cache(model, "kvfold").method.heads, range(4))
    assert len(passes) == 1 and not any(passes[0]) and all(heads is first for heads in again)
    assert [module.training for module in model.modules()] == [
        module not in set(frozen.modules()) for module in model.modules()
    ]
    for other in ("kvfold(heads='even')", "kvfold(budget=1.0)"):
        kvfold.Cache(copy.deepcopy(model), other)  # which has the hook, too
    assert len(passes) == 1


def test_another_thread_reads_meanwhile():
    """A server's: its passes are none of the probe's."""
    model, ids, found = copy.deepcopy(subject("llama")).eval(), torch.arange(2, 34)[None], []

    def read():
        with torch.no_grad():
            return model(ids).logits

    def meanwhile(*_):
        if not found:
            found.append(None)
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(read).result())

    before, table = read(), copying_heads(subject("llama").eval())
    model.model.layers[1].register_forward_pre_hook(meanwhile)
    assert copying_heads(model) == table
    torch.testing.assert_close(found[1], before, rtol=1e-4, atol=1e-4)


def test_attention_that_says_nothing():
    model = copy.deepcopy(subject("llama")).eval()
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    table = torch.tensor(copying_heads(model))
    assert (table[[0, 2]] > 0).all() and not table[1].any()
