"""Parameters have one name whichever spec a layer was built from."""

from megarl.models.common.specs import unfused_name


def test_norms_fused_into_linear_layers_have_their_plain_names():
    layer = "language_model.decoder.layers.3."
    assert unfused_name(f"{layer}self_attention.linear_qkv.layer_norm_weight") == f"{layer}input_layernorm.weight"
    assert unfused_name(f"{layer}mlp.linear_fc1.layer_norm_weight") == f"{layer}pre_mlp_layernorm.weight"
    assert unfused_name(f"{layer}mlp.linear_fc1.weight") == f"{layer}mlp.linear_fc1.weight"
