"""Own forward passes with hook points. Needs torch and safetensors only; nothing is imported here."""
