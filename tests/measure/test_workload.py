import math

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tersor
from tersor.core.errors import ArtifactError, InputError
from tersor.core.step import Context
from tersor.measure.compute import macs
from tersor.measure.graph_workload import workload
from tersor.measure.kv_cache import kv_cache
from tersor.measure.onnx_workload import onnx_workload
from tersor.measure.workload import Builder, Operation


class Net(nn.Module):
    """A stem, a residual block with a depthwise layer, attention over its pixels, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.query = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.point(F.relu(self.norm(self.deep(x)))))
        x = x.flatten(2).transpose(1, 2)
        x = F.scaled_dot_product_attention(self.query(x)[:, None], x[:, None], x[:, None])[:, 0]
        return self.head(x.mean(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(2, 3, 6, 6),)


def run(reads, writes, **more):
    return Operation(more.get("layer", "-".join(writes)), "op", more.get("macs", 0), {}, tuple(reads), ())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_peak_of_activations_is_that_of_a_naive_look_at_every_moment(data):
    count = data.draw(st.integers(1, 8))
    sizes = [data.draw(st.integers(1, 50)) for _ in range(count + 1)]
    reads = [sorted(data.draw(st.sets(st.integers(0, n), min_size=1, max_size=3))) for n in range(count)]
    uses = {f"v{v}": sum(v in each for each in reads) + (v == count) for v in range(count + 1)}
    builder = Builder(uses)
    builder.give("v0", sizes[0], 32)
    for n, inputs in enumerate(reads):
        builder.run(run([f"v{v}" for v in inputs], [f"v{n + 1}"]), {f"v{n + 1}": (sizes[n + 1], 32)})
    found = builder.workload("random", 1, {}, ["v0"], [f"v{count}"])

    def alive(value, moment):
        last = count if value == count else max([n for n, inputs in enumerate(reads) if value in inputs], default=-1)
        made = value - 1
        return made <= moment <= max(last, made)

    naive = max(sum(sizes[v] for v in range(count + 1) if alive(v, n)) for n in range(count))
    assert found.activation_peak() == 4 * max(naive, sizes[0])


def test_multiplications_of_layers_add_up_to_those_of_torchs_counter(net):
    model, inputs = net
    found = workload(model, inputs)
    assert found.macs == 2 * macs(model, inputs).value
    assert sum(layer.macs for layer in found.layers()) == found.macs


def test_recurrent_layers_are_counted_with_all_their_matrices():
    model, inputs = nn.LSTM(4, 6, batch_first=True).eval(), (torch.randn(2, 5, 4),)
    assert workload(model, inputs).macs == 2 * macs(model, inputs).value == 2 * 5 * (24 * 4 + 24 * 6)


def test_a_convolution_with_norm_and_activation_moves_input_weights_and_output_only(net):
    model, inputs = net
    stem = next(layer for layer in workload(model, inputs).layers() if layer.path == "stem.0")
    pixels = 2 * 6 * 6
    norm = 4 * 8 * 4  # weight, bias, mean, variance of the batch norm that is folded
    assert stem.weight_bytes == pytest.approx(8 * 3 * 9 * 4 + norm, abs=8)  # and how many batches it saw
    assert stem.activation_bytes == 4 * pixels * (3 + 8)
    assert stem.intensity == 2 * stem.macs / stem.bytes


def test_layers_without_fusion_are_not_hidden_and_depthwise_ones_are_named(net):
    model, inputs = net
    rows = {layer.path: layer for layer in workload(model, inputs).layers()}
    assert rows["deep"].operator == "depthwise conv2d"
    assert "norm" not in rows and rows["point"].activation_bytes == 4 * 2 * 36 * 8 * 3  # reads two, writes their sum


def test_attention_keeps_its_scores_while_it_runs():
    class Attend(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    found = workload(Attend(), (torch.randn(1, 2, 50, 4),))
    assert found.activation_peak() == 4 * (2 * 50 * 4 * 2 + 2 * 50 * 50)


def test_an_elementwise_chain_is_computed_in_place_but_not_where_its_input_is_read_again():
    class Chain(nn.Module):
        def forward(self, x):
            return (x.cumsum(0).exp() + 1).tanh()

    class Kept(nn.Module):
        def forward(self, x):
            y = x.cumsum(0)
            return y.exp().cumsum(0) + y

    n = 100
    assert workload(Kept(), (torch.randn(n),)).activation_peak() == 4 * 3 * n
    chained = workload(Chain(), (torch.randn(n),))
    assert len({name for op in chained.operations[1:] for name in (*op.reads, *op.writes)}) == 1


def test_tied_weights_lie_in_memory_once_and_embeddings_are_read_by_rows():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1000, 16)
            self.head = nn.Linear(16, 1000, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x))

    found = workload(Tied().eval(), (torch.zeros(1, 3, dtype=torch.long),))
    rows = {layer.path: layer for layer in found.layers()}
    assert found.weight_bytes == 4 * 16000
    assert rows["table"].weight_bytes == 4 * 3 * 16 and rows["head"].weight_bytes == 4 * 16000


def test_a_file_says_what_its_model_says(net, tmp_path):
    model, inputs = net
    tersor.export_onnx(model, inputs, tmp_path / "model.onnx")
    graph, file = workload(model, inputs), onnx_workload(tmp_path / "model.onnx", batch=2)
    assert file.macs == graph.macs
    stems = [next(iter(found.layers())) for found in (graph, file)]
    assert stems[0].activation_bytes == stems[1].activation_bytes and not file.notes
    assert file.weight_bytes == pytest.approx(graph.weight_bytes, rel=0.15)  # batch norms are folded in the file


def test_a_file_in_integers_has_a_quarter_of_the_bytes_and_runs_in_integers(net, tmp_path):
    model, inputs = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)), net[1]
    task = tersor.Task(model, calibration=DataLoader(TensorDataset(inputs[0], torch.zeros(2)), batch_size=2))
    done = task.complete(needs=())
    quantised = tersor.Quantize(learn=False).run(model, done, Context()).model
    tersor.export_onnx(model, inputs, tmp_path / "float.onnx")
    tersor.export_onnx(quantised, inputs, tmp_path / "int8.onnx")
    before, after = (onnx_workload(tmp_path / f"{name}.onnx") for name in ("float", "int8"))
    assert (before.compute, after.compute) == ("float", "int8") and after.macs == before.macs
    assert after.weight_bytes == pytest.approx(before.weight_bytes / 4, rel=0.1)
    assert after.activation_peak() == pytest.approx(before.activation_peak() / 4, rel=0.1)


def test_four_bit_weights_are_half_a_byte_and_their_products_stay_float(tmp_path):
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval(), (torch.randn(2, 64),)
    task = tersor.Task(model, calibration=DataLoader(TensorDataset(inputs[0], torch.zeros(2)), batch_size=2))
    done = task.complete(needs=())
    low = tersor.QuantizeWeights(tersor.Int(4, group_size=32)).run(model, done, Context()).model
    tersor.export_onnx(low, inputs, tmp_path / "low.onnx")
    found = onnx_workload(tmp_path / "low.onnx")
    packed = 64 * 74 / 2
    assert packed < found.weight_bytes < packed + 64 * 74 / 32 * 8 + 4 * 100
    assert found.compute == "float" and found.macs == 64 * 74 and not found.notes


def test_a_file_that_is_damaged_or_leaves_a_dimension_open_is_refused(tmp_path, perceptron):
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="no ONNX file"):
        onnx_workload(tmp_path / "broken.onnx")
    path = perceptron()
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    onnx.save(proto, path)
    with pytest.raises(InputError, match="leaves a dimension open.*width"):
        onnx_workload(path)


def test_open_dimensions_have_the_sizes_that_are_given(tmp_path):
    model, tokens = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)).eval(), torch.zeros(2, 6, dtype=torch.long)
    tersor.export_onnx(model, (tokens,), tmp_path / "text.onnx")
    proto = onnx.load(tmp_path / "text.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "sequence"
    onnx.save(proto, tmp_path / "text.onnx")
    path, name = tmp_path / "text.onnx", proto.graph.input[0].name
    for key in ("sequence", f"{name}:1"):
        assert onnx_workload(path, batch=3, sizes={key: 7}).macs == 3 * 7 * 64
    with pytest.raises(InputError, match="--sizes sequence=128"):
        onnx_workload(path)
    with pytest.raises(InputError, match="no such open dimension.*sequence"):
        onnx_workload(path, sizes={"sequences": 7})
    with pytest.raises(InputError, match="not a size"):
        onnx_workload(path, sizes={"sequence": 0})


def test_a_graph_inside_an_operator_is_not_counted_and_said(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 20]> agraph (float[4, 4] x, bool c) => (float[4, 4] z)
    { y = If (c) <then_branch = g () => (float[4, 4] a) { a = MatMul(x, x) },
                  else_branch = h () => (float[4, 4] b) { b = MatMul(x, x) }>
       z = MatMul(y, x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "if.onnx")
    found = onnx_workload(tmp_path / "if.onnx", batch=4)
    assert found.macs == 64 and "1 × If: what it runs inside is not counted" in found.notes


class Windows(nn.Module):
    """Pads a sequence to whole windows of 4 by a size that the graph computes, and multiplies each."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(4, 8)

    def forward(self, x):
        x = F.pad(x, (0, (4 - x.shape[1] % 4) % 4))
        return self.inside(x.reshape(x.shape[0], -1, 4))


@pytest.mark.parametrize("beside", [False, True])
def test_shapes_that_hang_on_computed_sizes_are_known(tmp_path, beside):
    path = tmp_path / "windows.onnx"
    x = torch.randn(2, 10)
    torch.onnx.export(Windows(), (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n", 1: "length"}})
    if beside:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    found = onnx_workload(path, batch=3, sizes={"length": 10})
    assert not found.notes and found.macs == 3 * 3 * 4 * 8 and len(found.taken) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["weights.bin", "windows.onnx"][not beside :]


def one_node(path, *shapes, result=None, **node):
    values = [helper.make_tensor_value_info(f"x{n}", 1, shape) for n, shape in enumerate(shapes)]
    made = helper.make_node(inputs=[value.name for value in values], outputs=["y"], **node)
    graph = helper.make_graph([made], "one", values, [helper.make_tensor_value_info("y", 1, result)])
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    return onnx_workload(path)


@pytest.mark.parametrize(
    ("equation", "shapes", "count"),
    [
        ("bhi,hij->bhj", [(1, 4, 8), (4, 8, 6)], 4 * 8 * 6),
        ("...ij,jk->...ik", [(1, 3, 5, 4), (4, 7)], 3 * 5 * 4 * 7),
        ("bii->bi", [(1, 5, 5)], 0),
    ],
)
def test_products_in_einsteins_notation_are_counted(tmp_path, equation, shapes, count):
    found = one_node(tmp_path / "one.onnx", *shapes, op_type="Einsum", equation=equation)
    assert found.macs == count and not found.notes


@pytest.mark.parametrize(
    ("shapes", "count", "said"),
    [
        ([(), (3, 4)], 12, ()),
        ([(3, 4), None], 0, ("1 × Einsum: what it multiplies is not counted",)),
        ([(3, 4)], 0, ()),
    ],
)
def test_a_factor_that_is_not_there_or_not_known_is_no_scalar(tmp_path, shapes, count, said):
    equation = ",ij->ij" if () in shapes else "ij,jk->ik"
    found = one_node(tmp_path / "one.onnx", *shapes, result=(3, 4), op_type="Einsum", equation=equation)
    assert found.macs == count and found.notes == said


def test_a_transposed_factor_of_a_fused_product_is_summed_over_its_other_axis(tmp_path):
    found = one_node(
        tmp_path / "one.onnx", (1, 5, 3), (1, 5, 7), op_type="FusedMatMul", domain="com.microsoft", transA=1
    )
    assert found.macs == 3 * 5 * 7


def test_products_that_are_not_known_are_said(tmp_path):
    found = one_node(
        tmp_path / "one.onnx", *[(1, 6, 8)] * 3, op_type="MultiHeadAttention", domain="com.microsoft", num_heads=2
    )
    assert found.notes == ("1 × MultiHeadAttention: what it multiplies is not counted",)


def test_inputs_have_the_bytes_of_their_type():
    table = nn.Embedding(10, 4)
    assert workload(table, (torch.zeros(1, 50, dtype=torch.long),)).activation_peak() == 50 * 8 + 50 * 4 * 4
    double = nn.Linear(8, 2).double()
    assert workload(double, (torch.zeros(1, 8, dtype=torch.float64),)).activation_peak() == 8 * (8 + 2)


def test_narrower_numbers_and_channels_shrink_what_they_say(net):
    model, inputs = net
    found = workload(model, inputs)
    eight, half = found.stored_in(8, 8, "int8"), found.narrowed(0.5)
    small = 8 * 2  # two counters of batches, which are int64
    assert eight.weight_bytes == pytest.approx(found.weight_bytes / 4, abs=2 * small)
    assert eight.activation_peak() == found.activation_peak() / 4 and eight.compute == "int8"
    rows = [{layer.path: layer.macs for layer in each.layers()} for each in (found, half)]
    assert rows[1]["point"] == rows[0]["point"] / 4 and rows[1]["deep"] == rows[0]["deep"] / 2


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_the_key_value_cache_is_as_large_as_the_one_that_transformers_keeps(family, package):
    transformers = package("transformers")
    torch.manual_seed(0)
    if family == "Llama":
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = getattr(transformers, {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[family])(config).eval()
    with torch.no_grad():
        kept = model(torch.zeros(3, 7, dtype=torch.long), use_cache=True).past_key_values
    real = sum(part.numel() * 4 for layer in kept.layers for part in (layer.keys, layer.values))
    assert kv_cache(model, 7).bytes(32, batch=3) == real
    assert kv_cache(model).context == 64
    with pytest.raises(InputError, match="1 to 64"):
        kv_cache(model, 65)


def test_a_model_that_writes_no_text_keeps_no_cache(net):
    assert kv_cache(net[0]) is None
    assert math.isfinite(workload(*net).activation_peak())
