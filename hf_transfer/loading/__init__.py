"""Where backbones come from: one module a library, behind `hf_transfer.backbones.load_backbone`."""
