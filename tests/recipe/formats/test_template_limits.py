"""Chat templates that mean harm end within bounds, in any thread; all others are written out as without them."""

import asyncio
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from jinja2 import ext, meta, sandbox
from transformers.utils import chat_template_utils

from recipe.cello1.formats import template_limits
from recipe.cello1.formats.template_limits import BoundedSandbox, TemplateLimitError, limit_in_vllm, limit_templates
from tests.helpers.processes import environment

PLAIN = BoundedSandbox.__base__
MESSAGES = [{"role": "system", "content": "s" * 2000}, {"role": "user", "content": "u" * 3000}]
LONG = "{% set a = messages[0].content * 50 %}"
MUCH = "{% set r = range(99999)|list %}"
NEST = "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = VALUE %}{% endfor %}"
HOSTILE = {
    "times": "{{ 'ab' * 10**9 }}",
    "times, folded": "{{ ('ab' ~ 'cd') * 10**9 }}",
    "list": "{{ [messages] * 10**9 }}",
    "power": "{{ 10**(10**8) }}",
    "large numbers": "{% set x = 7**100000 %}{{ (x * x) // 3 }}",
    "number of text": "{{ (('f' * 99999)|int(0, 16) * 3)|string }}",
    "percent": "{{ '%3000000000d' % 1 }}",
    "percent, filter": "{{ '%3000000000d'|format(1) }}",
    "width of a star": "{{ '%*d' % (3000000000, 1) }}",
    "places of a star": "{{ '%.*f'|format(3000000000, 1.0) }}",
    "one value often": LONG + "{{ ('%(a)s' * 9999) % {'a': a} }}",
    "format": LONG + "{{ ('{0}' * 9999).format(a) }}",
    "width": "{{ '{:>3000000000}'.format(1) }}",
    "width of a value": "{{ '{:>{}}'.format(1, 3000000000) }}",
    "center": "{{ 'a'|center(3000000000) }}",
    "by name": "{{ ('a'|attr('center'))(3000000000) }}",
    "by map": "{{ ['a']|map('center', 3000000000)|list }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "tabs": "{{ ('\t' * 9999).expandtabs(99999) }}",
    "indent": "{{ ('\n' * 9999)|indent(99999) }}",
    "tojson": "{{ messages|tojson(indent=3000000000) }}",
    "time": "{{ strftime_now('%999999999d') }}",
    "translate": LONG + "{{ ('a' * 9999).translate({97: a}) }}",
    "bytes": "{{ (5).to_bytes(3000000000, 'big') }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "batch": "{{ [1]|batch(3000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(300000000)|list }}",
    "replace": LONG + "{{ a.replace('', a) }}",
    "replace, filter": LONG + "{{ a|replace('', a) }}",
    "join": LONG + "{{ range(99999)|join(a) }}",
    "join, method": LONG + "{{ a.join('a' * 9999) }}",
    "join, one by one": LONG + "{{ range(9999)|map('string')|join(a) }}",
    "sum": MUCH + "{{ ([r] * 3000)|sum(start=[]) }}",
    "doubled": "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "added": "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "many at once": LONG + "{{ " + " ~ ".join(["a"] * 2000) + " }}",
    "written": "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "constants": "{% set b %}{% for i in range(99999) %}" + "z" * 3000 + "{% endfor %}{% endset %}",
    "copies": LONG + "".join(f"{{% set a{i} = a[1:] %}}" for i in range(2000)),
    "nested lists": NEST.replace("VALUE", "[n.a, n.a]") + "{{ n.a }}",
    "nested tuples": NEST.replace("VALUE", "(n.a, n.a)") + "{{ {n.a: 1} }}",
    "nested dicts": NEST.replace("VALUE", "{'a': n.a, 'b': n.a}") + "{{ n.a|tojson }}",
    "credit": "{% set x = [1]|_steps(-10**18)|list %}{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "loops": MUCH + "{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
    "one by one": "{% for i in range(99999)|map('string') %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "looked up": MUCH + "{% for i in r %}{% if -1 in r or -2 in r %}x{% endif %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive": "{% for x in [1] recursive %}{{ loop([1, 1]) if loop.depth < 40 }}{% endfor %}",
    "comments": "{{ ('<!-- -->' * 999)|striptags }}",
    "addresses": "{{ ('http://a' * 999)|urlize }}",
    "lines": "{{ ('a' * 999)|wordwrap(1) }}",
    "punycode": "{{ ('é' * 999).encode('punycode') }}",
    "long": "a" * 300_000,
}
ORDINARY = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.last }} {{ loop.revindex }}{% endfor %}",
    "{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}{% for q in nothing %}{% else %}none{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ '(' ~ loop(x) ~ ')' if x is iterable else x }}{% endfor %}",
    "{{ '%s:%05d' % ('a', 12345678901) }}{{ '{:>8}'.format('x') }}{{ x|default(1234567890123) }}",
    "{% set n = namespace(a=[]) %}{% for m in messages %}{% set n.a = n.a + [m.role] %}{% endfor %}{{ n.a|join(',') }}",
    "{{ {'a': [1, {'b': 'é'}]}|tojson(indent=1) }}{{ messages|tojson }}",
    "{{ messages[1:]|length }}{{ messages[0].content[:3] }}{{ messages[::-1][0]['role'].upper() }}",
    "{{ [3, 1, 2]|sort|map('string')|join('-') }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(3) %}c{% endcall %}",
    "{% for i in range(10) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ range(5)|sum }}",
    "{{ 'a' is string }}{{ 3 is divisibleby 3 }}{{ x is defined }}{{ 'b' in ['a', 'b'] }}{{ 2 ** 10 }}{{ 'ab' * 2 }}",
    "{{ '<a>'|e }}{{ ('<b>'|safe) ~ 'x' }}{{ 'a b'.split() }}{{ 'ab'.replace('a', 'cc')|trim }}{{ [1, (2, 3)] }}",
    "{% macro f(name, first, function, _) %}{{ name }}{{ first }}{{ function }}{{ _ }}{% endmacro %}"
    "{{ f(name=1, first=2, function=3, _=4) }}{{ dict(name=1, first=2) }}",
    "{% generation %}{{ messages[0].role }}{% endgeneration %}{% set b %}x{{ 1 }}{% endset %}{{ b }}",
]


@pytest.fixture(autouse=True)
def limited(monkeypatch):
    monkeypatch.setattr(template_limits, "MOST_ADDED", 1 << 14)  # a sixty-fourth: all end at once
    limit_templates()


def render(template, **options):
    return chat_template_utils.render_jinja_template([MESSAGES], chat_template=template, **options)[0][0]


def in_a_thread(template):
    found = []

    def work():
        try:
            found.append(render(template))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_means_harm_ends_in_any_thread(template):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(in_a_thread(template), TemplateLimitError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (64 << 10)  # KiB


@pytest.mark.parametrize("template", ORDINARY)
def test_all_others_are_written_out_as_without_bounds(template, monkeypatch):
    found = render(template)
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", PLAIN)
    assert found == chat_template_utils._cached_compile_jinja_template(template).render(messages=MESSAGES)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_is_only_looked_at_reckons_nothing(template):
    """As vLLM does for the names in it: jinja works out what is constant."""
    before = time.thread_time()
    environment = BoundedSandbox(extensions=[ext.loopcontrols])
    try:
        assert meta.find_undeclared_variables(environment.parse(template)) <= {"messages", "strftime_now"}
    except TemplateLimitError:
        assert len(template) > 200_000
    assert time.thread_time() < before + 5


def test_vllm_is_limited_where_it_is_asked_for(monkeypatch):
    for value, limited in (("", False), ("1", True)):
        monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", PLAIN)
        monkeypatch.setattr(sandbox, "ImmutableSandboxedEnvironment", PLAIN)
        monkeypatch.setenv(template_limits.LIMIT_TEMPLATES, value)
        limit_in_vllm()
        found = chat_template_utils.ImmutableSandboxedEnvironment, sandbox.ImmutableSandboxedEnvironment
        assert found == (BoundedSandbox if limited else PLAIN,) * 2


def test_jinjas_own_sandbox_is_left_to_others(monkeypatch):
    monkeypatch.setattr(sandbox, "ImmutableSandboxedEnvironment", PLAIN)
    limit_templates()
    assert sandbox.ImmutableSandboxedEnvironment is PLAIN
    limit_templates(in_jinja=True)
    assert sandbox.ImmutableSandboxedEnvironment is BoundedSandbox


def ways_to_render(kind):
    """What a library may do with a sandbox besides rendering a template once."""
    found = kind(finalize=lambda value: "-" if value is None else value)
    template = found.from_string(
        "{% macro f(name, first) %}{{ name|upper }}{{ 2 * 3 }}{{ first }}{% endmacro %}"
        "{{ none }}{{ f(name='a', first=x) }}"
    )
    waiting = kind(enable_async=True).from_string("{% for m in xs %}{{ m|title }}{{ loop.index }}{% endfor %}")
    return [
        str(template.module),
        template.module.f("b", first=None),
        template.render(x=1),
        "".join(template.generate(x=None)),
        found.compile_expression("x|sort|join('/') ~ 7 * 6")(x=[2, 1]),
        found.compile_expression("x|urlize is string")(x="http://a"),
        asyncio.run(waiting.render_async(xs=["ab", "cd"])),
    ]


def test_others_may_render_as_they_do_in_jinjas_own():
    assert ways_to_render(BoundedSandbox) == ways_to_render(PLAIN)


@pytest.mark.parametrize("table", ["filters", "tests"])
@pytest.mark.parametrize(
    "add",
    [
        lambda table, own: table.update(own=own),
        lambda table, own: table.update({"own": own}),
        lambda table, own: table.__ior__({"own": own}),
        lambda table, own: table.setdefault("own", own),
        lambda table, own: table.__setitem__("own", own),
    ],
)
def test_filters_that_are_added_are_paid_for(table, add):
    environment = BoundedSandbox()
    add(getattr(environment, table), lambda value: "x" * (len(value) + 1) * 10**6)
    use = "x|own" if table == "filters" else "x is own"
    template = environment.from_string("{% for i in range(99) %}{% set a = USE %}{% endfor %}".replace("USE", use))
    with pytest.raises(TemplateLimitError, match="makes or moves more than"):
        template.render(x="")


def test_what_a_template_says_is_the_models_part():
    template = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %};{% endfor %}"
    found = chat_template_utils.render_jinja_template(
        [MESSAGES], chat_template=template, return_assistant_tokens_mask=True
    )
    assert found == (["system;user;"], [[(0, 6), (7, 11)]])


def test_the_time_of_one_thread_is_limited_and_a_template_is_stopped_once(monkeypatch):
    monkeypatch.setattr(template_limits, "_TIME_LIMIT_S", 0.0)
    slow = "{% if messages[0].role == 'system' %}{% for i in range(9) %}{{ i }}{% endfor %}{% endif %}"
    assert "not done after 0.0 s" in str(in_a_thread(slow))
    monkeypatch.undo()
    limit_templates()
    assert "not done after 0.0 s" in str(in_a_thread(slow)), "the next of many prompts does not take as long again"


def test_long_prompts_may_take_more():
    template = "{% for i in range(40) %}{{ messages[0].content|trim|length }}{% endfor %}"
    long = [{"role": "user", "content": "x" * 300_000}]
    found = chat_template_utils.render_jinja_template([long], chat_template=template)[0][0]
    assert found == "300000" * 40


def test_transformers_still_has_no_bounds_of_its_own():
    """Fails once transformers makes its environment elsewhere, or bounds it: then look at `limit_templates` again."""
    source = Path(chat_template_utils.__file__).read_text()
    assert source.count("ImmutableSandboxedEnvironment(") == 1
    assert "from jinja2.sandbox import ImmutableSandboxedEnvironment" in source
    assert chat_template_utils.ImmutableSandboxedEnvironment is BoundedSandbox


@pytest.mark.slow
def test_verls_processes_are_limited_by_loading_the_dataset():
    """As those that render prompts in a training do: the one with the data, and the agent loops."""
    verl = pytest.importorskip("verl")
    code = (
        "import recipe.cello1.rl.dataset\n"
        "from transformers.utils.chat_template_utils import ImmutableSandboxedEnvironment as found\n"
        "print(found.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.split()[-1] == "BoundedSandbox", done.stderr
    loops = Path(verl.__file__).parent / "experimental" / "agent_loop" / "agent_loop.py"
    assert "self.dataset_cls = get_dataset_class(config.data)" in loops.read_text()
