"""One grammar of little stories in English: text to train on, and pairs of prompts that differ in one decision."""
