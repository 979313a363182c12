"""The nouns: recipe, model, graph, machine, plan, program, timeline, lock. Standard library and pydantic only."""
