"""Makes the files in this folder with AdapterHub's own library: what it saves, and what its models compute.

Each file holds a small random model, inputs, and for every adapter its weights and the output of the model with it. The
metadata are the configurations, as saved.

It needs an environment of its own, since that library holds transformers at 4.57:

    pip install adapters==1.3.0 torch safetensors
    python tests/adapterhub/make.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import adapters
import torch
from adapters.composition import Fuse
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

FOLDER = Path(__file__).parent
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 20, "max_position_embeddings": 16}
MODELS = {
    "bert": (BertModel, BertConfig(**SIZES, **TEXT)),
    "roberta": (RobertaModel, RobertaConfig(**SIZES, **TEXT, pad_token_id=1)),
    "llama": (LlamaModel, LlamaConfig(**SIZES, **TEXT)),
    "t5": (T5Model, T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
    "vit": (ViTModel, ViTConfig(**SIZES, image_size=8, patch_size=4)),
}
ADAPTERS = {
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=5),
    "second": adapters.SeqBnConfig(reduction_factor=2, non_linearity="leakyrelu"),
    "parallel": adapters.ParBnConfig(reduction_factor=8, scaling="learned"),
    "gated": adapters.DoubleSeqBnConfig(
        reduction_factor=4, use_gating=True, ln_after=True, adapter_residual_before_ln=True, non_linearity="gelu_new"
    ),
}


def main() -> None:
    for name, (cls, config) in MODELS.items():
        torch.manual_seed(0)
        model = cls(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        tensors = {f"model/{key}": value.clone() for key, value in model.state_dict().items()}
        texts = {"model": config.to_json_string()}
        inputs = make_inputs(name)
        tensors |= {f"inputs/{key}": value for key, value in inputs.items()}

        adapters.init(model)
        for adapter, adapter_config in ADAPTERS.items():
            model.add_adapter(adapter, config=adapter_config)
        fused = Fuse("pfeiffer", "second")
        model.add_adapter_fusion(fused)
        for key, parameter in model.named_parameters():
            if "adapter" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.eval()
        with torch.no_grad():
            for setup in (*ADAPTERS, fused):
                model.set_active_adapters(setup)
                key = "fusion" if setup is fused else setup
                tensors[f"outputs/{key}"] = model(**inputs).last_hidden_state
                with TemporaryDirectory() as folder:
                    save = model.save_adapter_fusion if setup is fused else model.save_adapter
                    save(folder, setup, use_safetensors=True)
                    [weights] = Path(folder).glob("*.safetensors")
                    [described] = Path(folder).glob("*.json")
                    tensors |= {f"{key}/{weight}": value for weight, value in load_file(weights).items()}
                    texts[key] = described.read_text()
        save_file(tensors, FOLDER / f"{name}.safetensors", texts)


def make_inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    inputs = {"input_ids": torch.randint(2, 20, (2, 7))}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(2, 20, (2, 5))
    return inputs


if __name__ == "__main__":
    main()
