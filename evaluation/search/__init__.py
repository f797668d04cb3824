"""The search of prompts on the forest, and what searches of any kind came to."""
