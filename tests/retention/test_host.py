"""Retained tensors on the host: gradients to the bit, what is left on the device, and in which order it comes back."""

import gc
import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

import framework
from framework.errors import RunError
from framework.retention import blocks_of, host
from framework.retention.block import SelectiveBlock, selective_call
from framework.retention.host import HostStore
from framework.retention.rows import SelectedRows
from framework.selection import Selection
from framework.training.memory import CpuMemoryTracker

BLOCKS, TOKENS, SELECTED = 6, 64, 8


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def model(families):
    """A Llama of six blocks with two heads to each key head."""
    return families.build("llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def inputs(model):
    ids = torch.arange(2 * TOKENS).view(2, -1) % model.config.vocab_size
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture
def chosen():
    """The last tokens of each sequence."""
    return torch.arange(TOKENS - SELECTED, TOKENS).expand(2, -1)


@pytest.fixture
def on_host(model):
    """The model, with what its blocks retain on the host."""
    framework.enable_token_selection(model, placement="host")
    yield model
    framework.disable_token_selection(model)


@pytest.fixture
def journal(monkeypatch):
    """What was sent (`+`) and fetched (`-`), numbered in the order of sending."""
    found, numbers = [], {}

    def sent(tensors, plain=host.to_host):
        copies = plain(tensors)
        numbers[copies[0].data_ptr()] = len([each for each in found if each > 0]) + 1
        found.append(numbers[copies[0].data_ptr()])
        return copies

    def fetched(copies, device, plain=host.to_device):
        found.append(-numbers[copies[0].data_ptr()])
        return plain(copies, device)

    monkeypatch.setattr(host, "to_host", sent)
    monkeypatch.setattr(host, "to_device", fetched)
    return found


@pytest.mark.parametrize("kv_format", ["model", "int8", "int4", "recompute"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3", "bert", "gemma3_text", "gpt_oss"])
def test_gradients_are_the_same_to_the_bit(families, steps, family, kv_format):
    model = families.build(family)
    inputs = families.sample_inputs(model)
    selection = steps.positions(model, inputs)
    for retain_linears in (False, True):
        options = {"retain_linears": retain_linears, "kv_format": kv_format}
        want_loss, want, _ = steps.selective(model, inputs, selection, **options)
        loss, got, fallbacks = steps.selective(model, inputs, selection, placement="host", **options)
        assert not fallbacks and loss == want_loss and equal(got, want)


@pytest.mark.parametrize("kv_format", ["model", "recompute"])
def test_dropout_of_adapters_is_on_the_host_too(families, steps, kv_format):
    model = families.build("llama")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora).double()
    inputs = families.sample_inputs(model)
    selection = steps.positions(model, inputs)
    options = {"kv_format": kv_format, "retain_linears": ["down_proj", "q_proj"]}
    _, want, _ = steps.selective(adapted, inputs, selection, **options)
    _, got, _ = steps.selective(adapted, inputs, selection, placement="host", **options)
    assert want and equal(got, want)


def test_experts_are_on_the_host_too(families, steps):
    model = families.build("qwen3_moe", dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    inputs = families.sample_inputs(model)
    selection = steps.positions(model, inputs)
    for retain_linears in (True, ["experts.down_proj"]):
        _, want, _ = steps.selective(model, inputs, selection, retain_linears=retain_linears)
        _, got, _ = steps.selective(model, inputs, selection, retain_linears=retain_linears, placement="host")
        assert equal(got, want)


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "lfm2"])
def test_recurrent_states_are_on_the_host_too(families, steps, family):
    model = families.build(family)
    inputs = families.sample_inputs(model, padding=0)
    mask = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    mask[0, 5:12] = mask[1, 7:11] = True
    selection = Selection.of_mask(mask, torch.ones(mask.shape))
    found = []
    for placement in ("device", "host"):
        state = framework.enable_token_selection(model, placement=placement)
        with framework.fixed_selection(model, selection):
            model(**inputs).loss.backward()
        framework.disable_token_selection(model)
        assert state.retention.in_runs
        found.append(steps.collect(model))
    assert equal(*found)


def test_blocks_that_fall_back_keep_their_input_on_the_device(families, steps, journal):
    model = families.build("qwen3_next")
    inputs = families.sample_inputs(model)
    selection = steps.positions(model, inputs)
    _, want, fallbacks = steps.selective(model, inputs, selection, strategy="uniform", ratio=0.5)
    _, got, _ = steps.selective(model, inputs, selection, strategy="uniform", ratio=0.5, placement="host")
    assert fallbacks and equal(got, want)
    assert len([each for each in journal if each > 0]) == len(blocks_of(model)) - len(fallbacks)


def test_a_block_is_sent_for_while_the_one_after_it_is_replayed(on_host, inputs, chosen, journal, monkeypatch):
    replayed = SelectiveBlock.backward

    def backward(ctx, *grads):
        journal.append(f"replay {ctx.call.name}")
        return replayed(ctx, *grads)

    monkeypatch.setattr(SelectiveBlock, "backward", staticmethod(backward))
    with framework.fixed_selection(on_host, chosen):
        loss = on_host(**inputs).loss
    assert journal == [*range(1, BLOCKS + 1)]
    journal.clear()
    loss.backward()
    # The last block's tensors had not left the device.
    expected = []
    for number in range(BLOCKS, 0, -1):
        expected += [f"replay model.layers.{number - 1}", *([1 - number] if number > 1 else [])]
    assert journal == expected


def block_bytes(model, tokens, rows):
    """Of what a block retains, in float64, of all tokens and of selected rows."""
    config = model.config
    keys = config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    linears = queries + 2 * keys + 2 * config.hidden_size + 2 * config.intermediate_size
    attention = queries + config.num_attention_heads
    return 8 * (2 * keys * tokens + (config.hidden_size + linears + attention) * rows)


def test_the_device_holds_a_block_after_the_forward_pass(model, inputs, chosen):
    def kept(placement):
        framework.enable_token_selection(model, placement=placement)
        with framework.fixed_selection(model, chosen):
            model(**inputs)
            with CpuMemoryTracker() as tracker:
                loss = model(**inputs).loss
        framework.disable_token_selection(model)
        found = tracker.current
        del loss
        return found

    one = block_bytes(model, 2 * TOKENS, 2 * SELECTED)
    assert kept("device") - kept("host") == (BLOCKS - 1) * one


def test_the_device_holds_two_blocks_in_the_backward_pass(on_host, inputs, chosen, monkeypatch):
    """What all calls of `keep` were given and what came back, alive at the beginning of each replay."""
    seen, alive = [], []

    def note(tensors):
        seen.extend(weakref.ref(tensor) for tensor in tensors)
        return tensors

    def fetched(copies, device, plain=host.to_device):
        return note(plain(copies, device))

    plain_keep, plain_fetch = HostStore.keep, host.Kept.fetch

    def fetch(kept):
        tensors = plain_fetch(kept)
        tensors_alive = [tensor for reference in seen if (tensor := reference()) is not None]
        alive.append(sum(tensor.nbytes for tensor in tensors_alive))
        return tensors

    monkeypatch.setattr(host, "to_device", fetched)
    monkeypatch.setattr(HostStore, "keep", lambda store, tensors: plain_keep(store, note(tensors)))
    monkeypatch.setattr(host.Kept, "fetch", fetch)
    with framework.fixed_selection(on_host, chosen):
        on_host(**inputs).loss.backward()
    one = block_bytes(on_host, 2 * TOKENS, 2 * SELECTED)
    assert alive == [2 * one] * (BLOCKS - 1) + [one]
    assert not any(reference() is not None for reference in seen)


def test_micro_batches_and_forwards_before_a_backward_have_stores_of_their_own(model, inputs, chosen, steps):
    others = {name: tensor.flip(1) for name, tensor in inputs.items()}

    def gradients(placement, order):
        framework.enable_token_selection(model, placement=placement)
        with framework.fixed_selection(model, chosen):
            if order is None:
                for batch in (inputs, others):
                    model(**batch).loss.backward()
            else:
                losses = [model(**batch).loss for batch in (inputs, others)]
                for number in order:
                    losses[number].backward()
        framework.disable_token_selection(model)
        return steps.collect(model)

    for order in (None, (0, 1), (1, 0)):
        assert equal(gradients("host", order), gradients("device", order))


def kept_alive():
    return [each for each in gc.get_objects() if type(each) is host.Kept]


def test_a_forward_without_a_backward_leaves_nothing(on_host, inputs, chosen, journal):
    with framework.fixed_selection(on_host, chosen):
        loss = on_host(**inputs).loss
        assert len(kept_alive()) == BLOCKS
        del loss
        assert not kept_alive()
        journal.clear()
        # Not sent for by the next one's backward pass, either.
        on_host(**inputs).loss.backward()
    assert len([each for each in journal if not isinstance(each, str) and each < 0]) == BLOCKS - 1
    journal.clear()
    with torch.no_grad():
        on_host(**inputs)
    on_host.eval()(**inputs).loss.backward()
    on_host.train()
    assert not journal and not kept_alive()


@pytest.mark.parametrize("phase", ["record", "replay"])
def test_an_exception_leaves_nothing(on_host, inputs, chosen, steps, phase, monkeypatch):
    with framework.fixed_selection(on_host, chosen):
        on_host(**inputs).loss.backward()
        want = steps.collect(on_host)
        layer = on_host.model.layers[3]

        def fail(module, *_):
            if (torch._C._current_graph_task_id() != -1) == (phase == "replay"):
                raise MemoryError("no room")

        handle = layer.mlp.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError, match="no room"):
            on_host(**inputs).loss.backward()
        handle.remove()
        assert not kept_alive()
        on_host.zero_grad(set_to_none=True)
        on_host(**inputs).loss.backward()
    assert equal(steps.collect(on_host), want)


def test_layouts_and_dtypes_come_back_as_they_were():
    store = HostStore()
    tensors = [
        torch.randn(2, 3, 4, 5).transpose(1, 2),
        torch.arange(6, dtype=torch.int8),
        torch.tensor([True, False]),
        torch.zeros(0, 4),
    ]
    first, second = store.keep(tensors), store.keep([torch.ones(3)])
    assert torch.equal(second.fetch()[0], torch.ones(3))
    for given, fetched in zip(tensors, first.fetch(), strict=True):
        assert torch.equal(given, fetched) and given.stride() == fetched.stride() and given.dtype == fetched.dtype
        assert given.numel() == 0 or given.data_ptr() != fetched.data_ptr()
    with pytest.raises(AssertionError, match="fetched once"):
        first.fetch()


def test_the_computation_waits_for_a_copy_where_its_memory_is_freed_and_where_it_is_used(monkeypatch):
    journal, events = [], iter("abcdefg")

    def now(kept):
        journal.append(f"copy {(event := next(events))}")
        return event

    monkeypatch.setattr(host.Kept, "_now", now)
    monkeypatch.setattr(host.Kept, "_wait_for", lambda kept, event: event and journal.append(f"wait {event}"))
    store = HostStore()
    kept = [store.keep([torch.full((2,), float(number))]) for number in range(3)]
    assert journal == ["copy a", "wait a", "copy b", "wait b", "copy c"]
    journal.clear()
    # The newest was not away, and is not waited for.
    assert kept.pop().fetch()[0].tolist() == [2, 2] and journal == ["copy d"]
    assert kept.pop().fetch()[0].tolist() == [1, 1] and journal == ["copy d", "wait d", "copy e"]
    # Nobody fetches the first, whose memory may still be written to.
    kept.clear()
    assert journal == ["copy d", "wait d", "copy e", "wait e"]


def test_what_is_on_another_device_stays_there():
    selection = SelectedRows(Selection.of_positions(torch.tensor([[0, 2]])), 4, torch.device("cpu"))
    options = {"name": "block", "retain_linears": True, "kv_format": "model", "random": True}
    call = selective_call(partial(torch.relu), torch.zeros(1, 4, 8), (), selection, **options)
    elsewhere, mask, rows = torch.empty(2, device="meta"), torch.tensor([True, False]), torch.ones(1, 2, 8)
    call.current.random.extend([elsewhere, mask])
    kept = call.put_away(rows, HostStore())
    assert call.current.random[0] is elsewhere and call.current.random[1] is not mask
    assert torch.equal(call.fetch(kept), rows)
    assert call.current.random[0] is elsewhere and torch.equal(call.current.random[1], mask)


def test_a_host_without_room_is_named(monkeypatch):
    def full(*_, **options):
        raise RuntimeError("CUDA error: out of memory")

    values = torch.zeros(3, 1000)
    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(RunError, match=r'retention.placement: "host" wants 12,000 bytes more .* \(CUDA error: out of'):
        HostStore().keep([values])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned copies need a CUDA device")
def test_copies_go_on_beside_the_computation_and_memory_is_free_without_waiting():
    store, size = HostStore(), 2**22
    before = torch.cuda.memory_allocated()
    kept = []
    for number in range(4):
        values = torch.full((size,), float(number), device="cuda")
        kept.append(store.keep([values]))
        del values
        # Its own and none of those before it, though their copies may not have ended.
        assert torch.cuda.memory_allocated() - before == 4 * size
    assert kept[0]._copies[0].is_pinned()
    for number in reversed(range(4)):
        (values,) = kept.pop().fetch()
        assert torch.cuda.memory_allocated() - before == 4 * size * (2 if number else 1)
        assert values.eq(number).all()
        del values
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned copies need a CUDA device")
@pytest.mark.parametrize("kv_format", ["model", "int8", "recompute"])
def test_a_device_gives_these_gradients_and_holds_less(families, steps, kv_format):
    model = families.build("llama", dtype=torch.bfloat16, num_hidden_layers=BLOCKS).cuda()
    ids = torch.arange(2 * 512, device="cuda").view(2, -1) % model.config.vocab_size
    found, peaks = [], []
    for placement in ("device", "host"):
        framework.enable_token_selection(model, placement=placement, kv_format=kv_format)
        with framework.fixed_selection(model, torch.arange(256, 512).expand(2, -1)):
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                model(input_ids=ids, labels=ids).loss.backward()
                gradients = steps.collect(model)
        framework.disable_token_selection(model)
        found.append(gradients)
        peaks.append(torch.cuda.max_memory_allocated())
        del gradients
    # Kernels need not add up in the same order twice.
    assert steps.worst_error(*found) < 0.01
    assert peaks[1] < peaks[0]
