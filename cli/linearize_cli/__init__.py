"""The command line: parse, call, print. Nothing here imports torch, transformers or peft until a command needs them."""
