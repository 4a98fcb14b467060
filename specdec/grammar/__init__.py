"""Structured output: grammars, their state along token trees, and the masks that keep a text to them.

A grammar is given as a :class:`~specdec.grammar.inputs.Grammar`, compiled for a tokenizer by a
:class:`~specdec.grammar.compiler.GrammarCompiler`, and followed for one row by a
:class:`~specdec.grammar.row.RowGrammar`, which is attached as ``row.grammar`` before or between any two steps.
"""
