"""Two hundred texts that would run a script, were one of them ever read as HTML, as an address or as a program."""

from __future__ import annotations

from itertools import product

RUN = "window.ran=1"
TAGS = [
    "img src=x",
    "svg",
    "body",
    "iframe src=x",
    "video src=x",
    "details open",
    "input autofocus",
    "marquee",
    "a href=x",
    "object data=x",
]
HANDLERS = ["onerror", "onload", "onfocus", "ontoggle", "onmouseover", "onstart"]
BREAKS = ['"', "'", "`", "</script>", "-->", "</title>", "</textarea>", "]]>", "\\", "${"]
SCHEMES = [
    "javascript:",
    "JaVaScRiPt:",
    " javascript:",
    "java\tscript:",
    "\x01javascript:",
    "data:text/html,",
    "vbscript:",
    "//",
]
WHOLE = [
    f"<script>{RUN}</script>", f"<ScRiPt>{RUN}</sCrIpT>", f"<<script>{RUN}//<</script>", f"<script\x0c>{RUN}</script>",
    f"<svg><script>{RUN}</script></svg>", f"<math><mtext></form><form><img src=x onerror={RUN}>", f"<style>@import'{RUN}'</style>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>", f"<base href='javascript:{RUN}//'>", f"<iframe srcdoc='<script>{RUN}</script>'>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;", f"&#60;script&#62;{RUN}&#60;/script&#62;", f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f"%3Cscript%3E{RUN}%3C/script%3E", f"<a href='javascript:{RUN}'>x</a>", f"<template><script>{RUN}</script></template>",
    f"<img src=x onerror\n={RUN}>", f"<img/src=x/onerror={RUN}>", f"<x contenteditable onblur={RUN}>", f"<svg/onload={RUN}>",
    f"{{{{constructor.constructor('{RUN}')()}}}}", f"${{{RUN}}}", f"<%= {RUN} %>", f"__proto__[html]=<img src=x onerror={RUN}>",
    f"<!--<img src='--><img src=x onerror={RUN}>'>", f"<noscript><p title='</noscript><img src=x onerror={RUN}>'>",
]  # fmt: skip

STRINGS = [
    *WHOLE,
    *(f"<{tag} {handler}={RUN}>" for tag, handler in product(TAGS, HANDLERS)),
    *(f"{one}><img src=x onerror={RUN}>" for one in BREAKS),
    *(f"{one}><script>{RUN}</script>" for one in BREAKS),
    *(f"{one} onfocus={RUN} autofocus x={one}" for one in BREAKS),
    *(f"{scheme}{RUN}" for scheme in SCHEMES),
    *(f"<a href='{scheme}{RUN}'>x</a>" for scheme in SCHEMES),
    *(f"<iframe src='{scheme}{RUN}'></iframe>" for scheme in SCHEMES),
    *(f"<form action='{scheme}{RUN}'><button autofocus>x</button></form>" for scheme in SCHEMES),
    *(f"{chr(point)}<img src=x onerror={RUN}>{chr(point)}" for point in (0x2028, 0x202E, 0x200B, 0xFEFF, 0x0B, 0x7F, 0x1F600, 0xFFFD)),
    *(f"{'<' * n}img src=x onerror={RUN}{'>' * n}" for n in range(2, 50)),
]  # fmt: skip
