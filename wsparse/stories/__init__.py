"""One grammar of little stories: text to train on, and pairs of prompts that differ in one decision."""
