"""The HTTP server: OpenAI's interface in front of the serving engine. Needs the extra ``serve``.

``app`` puts it together; ``gate`` stands before everything, ``bodies`` says what may be asked, ``service`` asks the
engine, ``formats`` and ``replies`` answer.
"""
