"""The families that can be converted, one description each: the only place that knows where a family keeps its parts.

Everything else, from the reader of config.json to the converted classes, asks here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .family import PREFIX, PROJECTIONS, TASKS, Family, Refusal

__all__ = [
    "FAMILIES",
    "PREFIX",
    "PROJECTIONS",
    "TASKS",
    "TEXT_PARTS",
    "Family",
    "Refusal",
    "auto_class",
    "body",
    "body_and_head",
    "implementation",
    "logits",
    "lookup",
]


def fused(path: str, output: str) -> dict[str, str]:
    """Projections of a family whose queries, keys and values come from one module; both paths from a layer."""
    return {"q_proj": path, "k_proj": path, "v_proj": path, "o_proj": output}


def encoder(model_type: str, name: str, head: str, predictions: str) -> Family:
    """A masked language model built like BERT; `predictions` is where its decoder and its bias lie."""
    return Family(
        model_type=model_type,
        name=name,
        task="ForMaskedLM",
        attention_class=f"{name}SelfAttention",
        body=model_type,
        layers="encoder.layer",
        attention="attention.self",
        embedding="embeddings.word_embeddings",
        head=head,
        projections={
            "q_proj": "attention.self.query",
            "k_proj": "attention.self.key",
            "v_proj": "attention.self.value",
            "o_proj": "attention.output.dense",
        },
        arguments=("attention_mask",),
        rope=False,
        bidirectional=True,
        tied={
            f"{predictions}.decoder.weight": f"{model_type}.embeddings.word_embeddings.weight",
            f"{predictions}.decoder.bias": f"{predictions}.bias",
        },
        spare=(f"{model_type}.pooler.", f"{model_type}.embeddings.position_ids", "cls.seq_relationship."),
        renamed={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},
        refused=tuple(
            Refusal(key=key, allowed=(None, False), reason="an encoder that is converted reads both ways, and alone")
            for key in ("is_decoder", "add_cross_attention")
        ),
        note="an encoder keeps no cache: linear layers save time on long inputs, and no memory between calls",
    )


def two_matrices(first: str, second: str) -> dict[str, str]:
    """Projections of an MLP without a gate of its own: gate_proj and up_proj of recipes are its first matrix."""
    return {"gate_proj": first, "up_proj": first, "down_proj": second}


_CAUSAL = Refusal(
    key="use_bidirectional_attention",
    allowed=(None, False),
    reason="the linear layers of a decoder read past tokens only",
    hint="Convert a causal model of this family",
)
_EXPERTS = "only attention is converted: the experts and their router stay as they are"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", name="Llama"),
        Family(model_type="mistral", name="Mistral", sliding="all"),
        Family(model_type="qwen2", name="Qwen2", sliding="listed"),
        Family(model_type="qwen3", name="Qwen3", sliding="listed"),
        Family(model_type="qwen3_moe", name="Qwen3Moe", sliding="all", note=_EXPERTS),
        Family(model_type="mixtral", name="Mixtral", sliding="all", note=_EXPERTS),
        Family(
            model_type="gemma2",
            name="Gemma2",
            sliding="listed",
            softcap="attn_logit_softcapping",
            logit_cap="final_logit_softcapping",
            refused=(_CAUSAL,),
        ),
        Family(
            model_type="gemma3_text",
            name="Gemma3",
            module="gemma3",
            config_class="Gemma3TextConfig",
            body_class="Gemma3TextModel",
            sliding="listed",
            logit_cap="final_logit_softcapping",
            refused=(_CAUSAL,),
        ),
        Family(
            model_type="phi3",
            name="Phi3",
            sliding="all",
            projections=fused("self_attn.qkv_proj", "self_attn.o_proj")
            | {"gate_proj": "mlp.gate_up_proj", "up_proj": "mlp.gate_up_proj"},
        ),
        Family(model_type="olmo2", name="Olmo2"),
        Family(model_type="olmo3", name="Olmo3", sliding="listed"),
        Family(model_type="smollm3", name="SmolLM3", sliding="listed", rope_layers="no_rope_layers"),
        Family(model_type="granite", name="Granite", logit_divisor="logits_scaling"),
        Family(model_type="stablelm", name="StableLm", deaf_layers=True),
        Family(
            model_type="gpt_neox",
            name="GPTNeoX",
            body="gpt_neox",
            attention="attention",
            embedding="embed_in",
            arguments=("attention_mask",),
            cache="layer_past",
            projections=fused("attention.query_key_value", "attention.dense")
            | two_matrices("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            renamed={"embed_out.weight": "lm_head.weight"},
        ),
        Family(
            model_type="gpt2",
            name="GPT2",
            task_class="GPT2LMHeadModel",
            body="transformer",
            layers="h",
            attention="attn",
            embedding="wte",
            arguments=("past_key_values", "attention_mask"),
            rope=False,
            projections=fused("attn.c_attn", "attn.c_proj") | two_matrices("mlp.c_fc", "mlp.c_proj"),
            sizes={
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
                "intermediate_size": "n_inner",
            },
            refused=(
                Refusal(key="add_cross_attention", allowed=(None, False), reason="its layers read another model too"),
            ),
        ),
        Family(
            model_type="opt",
            name="OPT",
            body="model.decoder",
            body_class="OPTDecoder",
            arguments=("past_key_values", "attention_mask"),
            rope=False,
            query_scaled=True,
            explicit_positions=True,
            packs=False,
            projections={"o_proj": "self_attn.out_proj"} | two_matrices("fc1", "fc2"),
            sizes={"intermediate_size": "ffn_dim", "embedding_size": "word_embed_proj_dim"},
        ),
        encoder("bert", "Bert", head="cls", predictions="cls.predictions"),
        encoder("roberta", "Roberta", head="lm_head", predictions="lm_head"),
    )
}


TEXT_PARTS = {"gemma3": "gemma3_text"}
"""Models of text and images whose text model alone can be converted, where their config does not name it."""


def lookup(kind: Any) -> Family:
    """The family of a model type or a config, native or converted.

    Raises:
        KeyError: none of ours.
    """
    name = kind if isinstance(kind, str) else kind.model_type
    return FAMILIES[name.removeprefix(PREFIX)]


def implementation(config: Any) -> str:
    """The attention implementation of transformers that computes what a config says, of any model."""
    known = config.model_type.removeprefix(PREFIX) in FAMILIES
    return lookup(config).implementation if known else "sdpa"


def auto_class(config: Any) -> Any:
    """Transformers' Auto class that builds the model of a config, converted or not."""
    import transformers

    known = config.model_type.removeprefix(PREFIX) in FAMILIES
    return getattr(transformers, TASKS[lookup(config).task if known else "ForCausalLM"])


def body(model: Any) -> Any:
    """The part of a model that gives `last_hidden_state`."""
    return lookup(model.config).body_of(model)


def logits(model: Any, hidden: Any) -> Any:
    """Logits of last hidden states, as the whole model would give them."""
    return lookup(model.config).logits(model, hidden)


def body_and_head(model: Any) -> tuple[Any, Any] | None:
    """What gives last hidden states, and what makes logits of some of them; None for a family that is not ours."""
    family = FAMILIES.get(str(getattr(model.config, "model_type", "")).removeprefix(PREFIX))
    return None if family is None else (family.body_of(model), partial(family.logits, model))
