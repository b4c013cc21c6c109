"""How reports name modules."""

from peft_kernels.printing import indented, starred


def test_numbers_become_stars():
    assert (
        starred("layers.3.experts.12.w1") == "layers.*.experts.*.w1" and starred("3") == "*" and starred("l3") == "l3"
    )


def test_names_are_indented_below_those_around_them():
    names = ["layers.*", "layers.*.mlp", "layers.*.mlp", "layers.*.mlp.up", "layers.*.mlp2", "norm", "norm.weight"]
    assert list(indented(names)) == ["layers.*", "  mlp", "  mlp", "    up", "  mlp2", "norm", "  weight"]
    assert list(indented(["", "head", "head.up"])) == ["(the model)", "  head", "    up"]
