"""The page at `/`: a conversation, and beside it what the machine does for it.

document.py  the page as one document with everything inside, and its headers

What a browser gets is made of page.html, page.css and the scripts: markdown.js (a model's text as elements), api.js
(requests, errors, answers as they arrive), conversation.js (turns), machine.js (memory, figures, experts), page.js
(settings, sending, stopping).
"""
