"""Hugging Face classes; importing this package registers them with AutoConfig and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModelForCausalLM

from linear_moe.inference.hf.configuration import LinearMoEConfig
from linear_moe.inference.hf.modeling import LinearMoECache, LinearMoEForCausalLM

AutoConfig.register(LinearMoEConfig.model_type, LinearMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(LinearMoEConfig, LinearMoEForCausalLM, exist_ok=True)

__all__ = ["LinearMoECache", "LinearMoEConfig", "LinearMoEForCausalLM"]
