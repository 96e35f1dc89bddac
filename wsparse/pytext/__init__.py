"""One grammar of simple Python: text to train on, and pairs of prompts that differ in one decision."""
