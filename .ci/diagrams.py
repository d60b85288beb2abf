"""The diagrams of the course, nbs/images/NAME.svg, drawn by plain Python. `write` writes them, `check` compares them
with what is there. Building one fails where a text leaves its box, lies on another, or an arrow crosses a box."""
import random
import sys
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT/'nbs/images'
EMBEDDED = dict(whole='story/00_start_here', chain='story/03_diffusion', step='story/05_samplers', unet='story/06_unet',
                attention='story/10_attention', guidance='story/12_guidance', where='paper/04_conditions',
                **{'first-stage': 'story/07_autoencoder', 'two-stages': 'story/09_latent_diffusion',
                   'training-step': 'story/13_training', 'whole-02': 'story/02_data',
                   'whole-14': 'story/14_one_object'})

# One grammar for all. A kind of box: fill, line and text by day, then by night.
KINDS = dict(data=('#dbeafe', '#2563eb', '#0f172a', '#1e3a5f', '#7db4ff', '#f1f5f9'),
             net=('#ffe4c4', '#c2570c', '#0f172a', '#5a3413', '#ffb070', '#f1f5f9'),
             frozen=('#f6efe6', '#c2570c', '#0f172a', '#3a2f24', '#ffb070', '#f1f5f9'),
             op=('#e5e7eb', '#6b7280', '#0f172a', '#39404d', '#b6bdc9', '#f1f5f9'),
             cond=('#dcf5dc', '#2e8540', '#0f172a', '#1f4a2b', '#7fd693', '#f1f5f9'),
             loss=('#fde0e6', '#c81e4a', '#0f172a', '#5c1a30', '#ff8fab', '#f1f5f9'))
LINES = dict(flow=('#334155', '#cbd5e1'), cond=('#2e8540', '#7fd693'), loss=('#c81e4a', '#ff8fab'),
             data=('#2563eb', '#7db4ff'), net=('#c2570c', '#ffb070'), faint=('#94a3b8', '#64748b'))
NAMES = dict(data='tensor', net='network, trained here', frozen='network, frozen here', op='operation',
             cond='condition', loss='loss')


def style() -> str:
    day = ['text{font-family:"DejaVu Sans",Verdana,Arial,sans-serif;font-size:14px;fill:#0f172a}',
           '.small{font-size:13px}.big{font-size:17px}.bold{font-weight:bold}.it{font-style:italic}',
           '#background{fill:#ffffff}.panel{fill:#f8fafc;stroke:#cbd5e1}.soft{fill:#475569}.badge{fill:#0f172a}'
           '.badgetext{fill:#ffffff;font-size:12px;font-weight:bold}.here{fill:none;stroke:#d97706;stroke-width:3.5}']
    night = ['text{fill:#f1f5f9}#background{fill:#10151f}.panel{fill:#171e2b;stroke:#3b475c}.soft{fill:#b3bfd0}'
             '.badge{fill:#e2e8f0}.badgetext{fill:#0f172a}']
    for k, (fill, line, text, nfill, nline, ntext) in KINDS.items():
        dash = ';stroke-dasharray:5 3' if k == 'frozen' else ''
        day.append(f'.{k}{{fill:{fill};stroke:{line}{dash}}}.{k}t{{fill:{text}}}')
        night.append(f'.{k}{{fill:{nfill};stroke:{nline}}}.{k}t{{fill:{ntext}}}')
    for k, (line, nline) in LINES.items():
        day.append(f'.l-{k}{{stroke:{line};fill:none;stroke-width:1.8}}.h-{k}{{fill:{line}}}')
        night.append(f'.l-{k}{{stroke:{nline}}}.h-{k}{{fill:{nline}}}')
    return '\n'.join(day) + '\n@media (prefers-color-scheme: dark){\n' + '\n'.join(night) + '\n}'


# Widths in ems of DejaVu Sans, the widest of the usual fonts: what fits in it fits in all.
WIDTHS = {**dict.fromkeys("iljI|.,:;'!", .34), **dict.fromkeys('ftr()[]/- ', .42), **dict.fromkeys('mwMW@%', .95),
          **dict.fromkeys('+=<>×→−±≈∇', .85)}


def plain(text: str) -> str: return text.replace('_{', '').replace('}', '').replace('*', '')


def width(text: str, size: float = 14) -> float:
    ems = sum(WIDTHS.get(a, .72 if a.isupper() else .635) for a in plain(text))
    return ems*size - .25*size*text.count('_{')


def spans(text: str) -> str: # 'z_{t}' gets an index, '*x*' is italic
    out, low, italic = '', False, False
    i = 0
    while i < len(text):
        if text.startswith('_{', i):
            out += '<tspan dy="4" font-size="11.5">'
            low, i = True, i + 2
        elif text[i] == '}' and low:
            out += '</tspan><tspan dy="-4">&#8203;</tspan>'
            low, i = False, i + 1
        elif text[i] == '*':
            out += '</tspan>' if italic else '<tspan class="it">'
            italic, i = not italic, i + 1
        else:
            out += escape(text[i])
            i += 1
    return out


def overlap(a, b, slack=0.) -> bool: # of two rectangles (x0, y0, x1, y1)
    return a[0] < b[2] - slack and b[0] < a[2] - slack and a[1] < b[3] - slack and b[1] < a[3] - slack


def crosses(p, q, r) -> bool: # does the line from p to q go through the inside of rectangle r?
    (x0, y0), (x1, y1) = p, q
    n = max(int(max(abs(x1 - x0), abs(y1 - y0))), 1)
    at = ((x0 + (x1 - x0)*k/n, y0 + (y1 - y0)*k/n) for k in range(n + 1))
    return any(r[0] + 1.5 < x < r[2] - 1.5 and r[1] + 1.5 < y < r[3] - 1.5 for x, y in at)


class Diagram:
    "A picture that is checked as it is drawn: boxes, labels and arrows, and what of them lies on what."
    def __init__(self, name: str, w: int, h: int, alt: str):
        self.name, self.w, self.h, self.alt = name, w, h, alt
        self.back, self.parts = [], []
        self.boxes, self.labels, self.lines, self.inner = [], [], [], []

    def fail(self, what: str): raise ValueError(f'diagram {self.name}: {what}')

    def panel(self, x, y, w, h, title=''): # a region with a title; things lie on it
        self.back.append(f'<rect class="panel" x="{x}" y="{y}" width="{w}" height="{h}" rx="8"/>')
        if title: self.text(x + 12, y + 20, title, 'bold', anchor='start')

    def box(self, x, y, w, h, lines, kind='data', shape='rect', small=True): # centre x, centre y; first line bold
        x0, y0 = x - w/2, y - h/2
        if shape == 'encoder': # narrows to the right
            d = f'M{x0} {y0} L{x0+w} {y0+h*.2:g} L{x0+w} {y0+h*.8:g} L{x0} {y0+h} Z'
        elif shape == 'decoder': d = f'M{x0} {y0+h*.2:g} L{x0+w} {y0} L{x0+w} {y0+h} L{x0} {y0+h*.8:g} Z'
        else: d = ''
        rx = dict(op=min(h/2, 16), loss=min(h/2, 16), net=6, frozen=6).get(kind, 1)
        self.parts.append(f'<path class="{kind}" stroke-width="1.5" d="{d}"/>' if d else
                          f'<rect class="{kind}" stroke-width="1.5" x="{x0:g}" y="{y0:g}" width="{w}" height="{h}" '
                          f'rx="{rx:g}"/>')
        lines = [lines] if isinstance(lines, str) else list(lines)
        step = 17
        top = y - (len(lines) - 1)*step/2 + 5
        for k, line in enumerate(lines):
            size, cls = (14, 'bold') if k == 0 else (13, 'small')
            wide = width(line, size)*(1.1 if k == 0 else 1)
            if wide > w - 4: self.fail(f'{line!r} takes {wide:.0f} of {w} px in its box')
            at = top + k*step
            self.inner.append((x - wide/2, at - .75*size, x + wide/2, at + .2*size))
            self.parts.append(f'<text class="{kind}t {cls}" x="{x:g}" y="{at:g}" '
                              f'text-anchor="middle">{spans(line)}</text>')
        if len(lines)*step > h + 2: self.fail(f'{lines} is higher than its box')
        for a in self.boxes:
            if overlap(a, (x0, y0, x0 + w, y0 + h)): self.fail(f'the box {lines} lies on another')
        self.boxes.append((x0, y0, x0 + w, y0 + h))

    def text(self, x, y, text, cls='', anchor='middle', on_line=False): # y is the base line
        size = 17 if 'big' in cls else 13 if 'small' in cls else 14
        w = width(text, size)*(1.1 if 'bold' in cls else 1)
        x0 = x - dict(start=0, middle=w/2, end=w)[anchor]
        r = (x0, y - .8*size, x0 + w, y + .25*size)
        if r[0] < 2 or r[2] > self.w - 2 or r[1] < 0 or r[3] > self.h: self.fail(f'{text!r} leaves the picture: {r}')
        for a in self.boxes + self.labels:
            if overlap(a, r, 1): self.fail(f'{text!r} lies on something at {r}: {a}')
        self.labels.append(r)
        if not on_line: self.lines.append((None, r, text))
        self.parts.append(f'<text class="{cls}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{spans(text)}</text>')

    def arrow(self, *points, kind='flow', head=True, dash=False, curve=None, both=False, thin=False):
        # along these points; a curve bends by that many pixels; a head at the end
        p, q = points[-2], points[-1]
        extra = ' stroke-dasharray="5 4"'*dash + ' style="stroke-width:1"'*thin
        if curve:
            (x0, y0), (x1, y1) = points
            mx, my = (x0 + x1)/2, (y0 + y1)/2 + curve
            d = f'M{x0:g} {y0:g} Q{mx:g} {my:g} {x1:g} {y1:g}'
            p = (mx, my)
            path = [((1-s)**2*x0 + 2*s*(1-s)*mx + s*s*x1, (1-s)**2*y0 + 2*s*(1-s)*my + s*s*y1)
                    for s in (k/40 for k in range(41))]
        else:
            d = 'M' + ' L'.join(f'{x:g} {y:g}' for x, y in points)
            path = list(points)
        for a, b in zip(path, path[1:]):
            for r in self.boxes:
                if crosses(a, b, r): self.fail(f'the arrow {points} crosses a box {r}')
            self.lines.append(((a, b), None, points))
        self.parts.append(f'<path class="l-{kind}" d="{d}"{extra}/>')
        if head: self.head(p, q, kind)
        if both: self.head(points[1], points[0], kind)

    def head(self, p, q, kind): # a triangle with its tip in q
        dx, dy = q[0] - p[0], q[1] - p[1]
        n = (dx*dx + dy*dy)**.5
        dx, dy = dx/n, dy/n
        a = (q[0] - 9*dx - 4.5*dy, q[1] - 9*dy + 4.5*dx)
        b = (q[0] - 9*dx + 4.5*dy, q[1] - 9*dy - 4.5*dx)
        self.parts.append(f'<path class="h-{kind}" d="M{q[0]:.1f} {q[1]:.1f} L{a[0]:.1f} {a[1]:.1f} '
                          f'L{b[0]:.1f} {b[1]:.1f} Z"/>')

    def badge(self, x, y, number): # the chapter that builds it
        r = (x - 9, y - 9, x + 9, y + 9)
        if any(overlap(a, r) for a in self.labels + self.inner): self.fail(f'badge {number} lies on a text')
        self.labels.append(r)
        self.parts.append(f'<circle class="badge" cx="{x}" cy="{y}" r="10.5"/><text class="badgetext" x="{x}" '
                          f'y="{y+4.3:g}" text-anchor="middle">{number}</text>')

    def dot(self, x, y, kind='flow',
            r=5): self.parts.append(f'<circle class="h-{kind}" cx="{x:g}" cy="{y:g}" r="{r}"/>')

    def legend(self, y, kinds, extra='', badge=''):
        x = 16
        for k in kinds:
            self.parts.append(f'<rect class="{k}" stroke-width="1.5" x="{x}" y="{y-11}" width="22" height="14" '
                              f'rx="{dict(op=7, loss=7, net=4, frozen=4).get(k, 1)}"/>')
            self.text(x + 28, y, NAMES[k], 'small soft', 'start')
            x += 28 + round(width(NAMES[k], 13)) + 16
        if badge:
            self.badge(x + 10, y - 4, 'n')
            self.text(x + 26, y, badge, 'small soft', 'start')
            x += 40 + round(width(badge, 13))
        if extra: self.text(x + 4, y, extra, 'small soft', 'start')

    def svg(self) -> str:
        for line, _, points in self.lines:
            if not line: continue
            for _, r, text in self.lines:
                if r and crosses(*line, r): self.fail(f'the arrow {points} goes through {text!r}')
        return '\n'.join([
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.w}" height="{self.h}" '
            f'viewBox="0 0 {self.w} {self.h}" role="img" aria-label="{escape(self.alt)}">',
            f'<title>{escape(self.alt)}</title>', f'<style>{style()}</style>',
            '<rect id="background" width="100%" height="100%"/>', *self.back, *self.parts, '</svg>', ''])


# ---- pictures of a few pixels ----

HOUSE = ('ssssssss', 'ssssssys', 'sssrssss', 'ssrrrsss', 'sswwwsss', 'ggwdwggg', 'gggggggg', 'gggggggg')
COLOURS = dict(s=(120, 170, 230), y=(250, 215, 90), r=(180, 60, 50), w=(235, 225, 205), d=(90, 60, 40), g=(90, 150, 80))


def mosaic(d: Diagram, x, y, side, abar, seed=3): # a tiny house, noised to this share of the signal's variance
    rng = random.Random(seed)
    cell = side/len(HOUSE)
    for i, row in enumerate(HOUSE):
        for j, a in enumerate(row):
            rgb = [abar**.5*(c/127.5 - 1) + (1 - abar)**.5*rng.gauss(0, 1) for c in COLOURS[a]]
            code = ''.join(f'{round(min(max((c + 1)*127.5, 0), 255)):02x}' for c in rgb)
            d.parts.append(f'<rect x="{x - side/2 + j*cell:g}" y="{y - side/2 + i*cell:g}" width="{cell + .3:g}" '
                           f'height="{cell + .3:g}" fill="#{code}"/>')
    d.boxes.append((x - side/2, y - side/2, x + side/2, y + side/2))


# ---- the ten ----

HERE = {'whole-02': ((11, 72, 74, 60), (12, 194, 204, 56)), 'whole-14': ((8, 272, 864, 164),)} # x, y, width, height

def whole(name: str = 'whole') -> Diagram: # the others: with marks around what a chapter is about
    d = Diagram(name, 880, 474, 'Latent diffusion. Training: a picture is encoded to a latent, noised, and the UNet '
                'predicts the noise; the loss compares. Sampling: noise is cleaned step by step by the same UNet and '
                'decoded to a picture. An embedder turns the caption into tokens for cross-attention '
                'and their mean, the pooled vector, which is added to the time embedding.')
    d.panel(8, 8, 864, 152, 'Training: learn to predict the noise')
    d.panel(8, 168, 864, 96, 'Condition')
    d.panel(8, 272, 864, 164, 'Sampling: from noise to a picture')
    y = 102 # training
    u = 460 # where the UNet stands
    d.box(48, y, 70, 52, ('*x*', '3×64×64'))
    d.box(140, y, 80, 64, 'Encoder', 'frozen', 'encoder')
    d.box(230, y, 68, 52, ('*z*_{0}', '4×16×16'))
    d.box(322, y, 88, 52, ('add noise', '*t*, *ε*'), 'op')
    d.box(u, y, 96, 60, ('UNet', '2.3 M'), 'net')
    d.box(606, y, 88, 52, ('*ε*_{θ}', '4×16×16'))
    d.box(744, y, 108, 52, ('loss', '|*ε* − *ε*_{θ}|²'), 'loss')
    for a, b in ((83, 100), (180, 196), (264, 278), (366, u - 48), (u + 48, 562), (650, 690)): d.arrow((a, y), (b, y))
    d.text(389, y - 9, '*z*_{t}')
    d.arrow((322, 76), (322, 48), (744, 48), (744, 76), kind='loss')
    d.text(600, 41, 'the noise *ε* that was added (shipped models: *v*)', 'small')
    y = 222 # condition
    d.box(114, y, 196, 48, ('caption *y*', 'a red house at night'), 'cond')
    d.box(300, y, 120, 56, ('embedder', '(text encoder)', '0.4 M'), 'net')
    d.box(414, y, 64, 48, ('*c*', '32×128'), 'cond')
    d.arrow((212, y), (240, y), kind='cond')
    d.arrow((360, y), (382, y), kind='cond')
    d.arrow((446, y - 10), (u, y - 10), (u, 132), kind='cond')
    d.arrow((446, y + 10), (u, y + 10), (u, 324), kind='cond')
    d.arrow((324, y - 28), (324, 146), (u - 28, 146), (u - 28, 132), kind='cond', thin=True)
    d.arrow((324, y + 28), (324, 304), (u - 28, 304), (u - 28, 324), kind='cond', thin=True)
    d.text(364, 299, 'pooled, 128', 'small', 'start')
    d.text(506, 204, 'cross-attention, at every step', 'small', 'start')
    d.text(506, 228, 'guidance: also without *c*, to compare', 'small', 'start')
    d.text(506, 252, 'thin: the pooled vector, mean of the tokens', 'small', 'start')
    y = 354 # sampling
    d.box(58, y, 88, 52, ('noise *z*_{T}', '4×16×16'))
    d.box(322, y, 72, 52, ('*z*_{t}', '4×16×16'))
    d.box(u, y, 96, 60, ('UNet', 'the same'), 'frozen')
    d.box(580, y, 88, 74, ('one step', 'to the next', 'lower noise', 'level'), 'op')
    d.box(673, y, 68, 52, ('*z*_{0}', '4×16×16'))
    d.box(754, y, 64, 64, 'Dec.', 'frozen', 'decoder')
    d.box(832, y, 68, 52, ('*x*', '3×64×64'))
    d.arrow((102, y), (286, y))
    d.text(190, y - 9, 'start here', 'small')
    for a, b in ((358, u - 48), (u + 48, 536), (624, 639), (707, 722), (786, 798)): d.arrow((a, y), (b, y))
    d.text(u + 62, y - 9, '*ε*_{θ}')
    d.arrow((580, y + 37), (580, 418), (322, 418), (322, y + 26))
    d.text(392, 411, '20 to 50 times', 'small')
    for x, at, n in ((83, 76, '02'), (150, 68, '07'), (364, 76, '03'), (u - 48, 74, '06'), (798, 76, '03'),
                     (360, 194, '11'), (492, 200, '10'), (492, 224, '12'), (492, 248, '11'), (u - 48, 326, '06'),
                     (626, 313, '05'),
                     (748, 322, '07'), (346, 24, '13'), (346, 288, '14')): d.badge(x, at, n)
    d.legend(459, ('data', 'net', 'frozen', 'op', 'cond'), badge='chapter')
    d.parts += [f'<rect class="here" x="{x}" y="{y}" width="{w}" height="{h}" rx="8"/>'
                for x, y, w, h in HERE.get(name, ())]
    return d


def chain() -> Diagram:
    d = Diagram('chain', 880, 330, 'The forward chain adds a little noise at each of T timesteps; the reverse chain, '
                'learned, removes it. One formula jumps from the picture to any timestep.')
    at, y, side = (80, 260, 440, 620, 800), 168, 96
    share = (1, .95, .84, .7, 0.)
    names = ('*z*_{0}', '*z*_{t−1}', '*z*_{t}', '*z*_{t+1}', '*z*_{T}')
    for x, a, name in zip(at, share, names):
        mosaic(d, x, y, side, a)
        d.text(x, y + 68, name, 'big')
    for x in (170, 710): d.text(x, y + 5, '…', 'big')
    d.text(80, y + 88, 'the data', 'small soft')
    d.text(800, y + 88, 'only noise', 'small soft')
    for a, b in ((312, 388), (492, 568)):
        d.arrow((a, y - 18), (b, y - 18), kind='data')
        d.arrow((b, y + 18), (a, y + 18), kind='net')
    d.arrow((80, y - 52), (80, 70), (440, 70), (440, y - 52), kind='data')
    d.text(16, 28, 'forward, fixed', 'bold', 'start')
    d.text(158, 28, '*q*(*z*_{t} | *z*_{t−1}): a little more noise at each timestep', '', 'start')
    d.text(96, 60, 'in one jump:  *z*_{t} = √ᾱ_{t} *z*_{0} + √(1 − ᾱ_{t}) *ε*', '', 'start')
    d.text(16, 296, 'reverse, learned', 'bold', 'start')
    d.text(180, 296, '*p*_{θ}(*z*_{t−1} | *z*_{t}): the network says which part of *z*_{t} is noise, and a '
           'little of it goes', '', 'start')
    d.parts.append('<rect class="h-data" x="16" y="34" width="112" height="3"/>')
    d.parts.append('<rect class="h-net" x="16" y="302" width="134" height="3"/>')
    return d


def step() -> Diagram:
    d = Diagram('step', 880, 400,
                'One sampling step: the network guesses the clean latent at noise level 0; the sampler '
                'goes along the straight line towards it, down to the next noise level.')
    left, right, y0, y1, y2 = 120, 560, 336, 206, 76 # levels 0, sigma', sigma
    for y, name, what in ((y2, '*σ*', 'now'), (y1, '*σ*′', 'after the step'), (y0, '0', 'no noise')):
        d.arrow((left, y), (right, y), kind='faint', head=False, dash=True)
        d.text(108, y + 1, name, 'big', 'end')
        d.text(108, y + 18, what, 'small soft', 'end')
    d.arrow((left, 350), (left, 44), kind='flow')
    d.text(left + 10, 46, 'noise level', 'small soft', 'start')
    z, zero = (500, y2), (200, y0)
    mid = (200 + 300*(y0 - y1)/(y0 - y2), y1)
    d.arrow(z, zero, kind='net', dash=True)
    d.arrow(z, (mid[0] + 4, mid[1] - 4), kind='data')
    d.dot(*z, 'data', 7)
    d.dot(*mid, 'data', 7)
    d.dot(*zero, 'net', 7)
    d.text(514, y2 - 10, '*z*', 'big', 'start')
    d.text(mid[0] + 16, y1 + 22, '*z*′', 'big', 'start')
    d.text(186, y0 + 26, 'ẑ_{0}', 'big', 'end')
    d.text(200, y0 + 26, 'what the network guesses from *z*', 'small', 'start')
    x = 608
    for k, line in enumerate(('1  ask the network:', '2  go towards it, to *σ*′:',
                             '3  repeat, with *z*′ as *z*')):
        d.text(x, (96, 166, 270)[k], line, 'bold' if k < 2 else 'bold', 'start')
    d.text(x + 22, 122, 'ẑ_{0} = denoise(*z*, *σ*)', '', 'start')
    d.text(x + 22, 194, '*z*′ = ẑ_{0} + *r* (*z* − ẑ_{0})', '', 'start')
    d.text(x + 22, 218, '*r* = *σ*′ / *σ*', '', 'start')
    d.text(x, 306, 'the last *σ*′ is 0: *z*′ = ẑ_{0}', 'small soft', 'start')
    d.text(16, 384, 'Here *z* is written at the scale of the data: *z* = *z*_{0} + *σ* × noise.  The other '
           'samplers change line 2.', 'small soft', 'start')
    return d


def unet() -> Diagram:
    d = Diagram('unet', 880, 486,
                'The UNet of the shipped model: two resolutions, 16x16 and 8x8. Each tensor of the down '
                'path is kept and joins the up path at the same resolution. The pooled vector of the caption is added '
                'to the time embedding; attention layers read its tokens.')
    d.panel(8, 8, 864, 108)
    d.panel(8, 124, 864, 142, '16×16: 48 channels')
    d.panel(8, 274, 864, 178, '8×8: 48, then 96')
    y, low, mid = 208, 340, 416
    d.box(46, 37, 48, 34, '*t*', 'cond')
    d.box(146, 37, 96, 40, ('time MLP', '192'), 'net')
    d.box(244, 37, 36, 32, '+', 'op')
    d.arrow((70, 37), (98, 37), kind='cond')
    d.arrow((194, 37), (226, 37), kind='cond')
    d.arrow((262, 37), (290, 37), kind='cond')
    d.text(298, 42, 'time embedding 192, added in every ResBlock', 'small', 'start')
    d.box(244, 90, 80, 40, ('linear', '192'), 'net')
    d.box(500, 90, 116, 40, ('embedder', '(text encoder)'), 'net')
    d.arrow((442, 90), (284, 90), kind='cond', thin=True)
    d.arrow((244, 70), (244, 53), kind='cond', thin=True)
    d.text(364, 83, 'pooled vector 128', 'small')
    d.box(622, 90, 72, 40, ('*c*', '32×128'), 'cond')
    d.arrow((558, 90), (586, 90), kind='cond')
    d.dot(672, 90, 'cond')
    d.text(684, 87, 'read in every attention', 'small', 'start')
    d.text(684, 104, 'layer: green dots', 'small', 'start')
    d.box(52, y, 72, 48, ('*z*_{t}', '4×16×16'))
    d.box(142, y, 68, 40, 'conv', 'net')
    d.box(236, y, 88, 40, 'ResBlock', 'net')
    d.box(640, y, 88, 40, 'ResBlock', 'net')
    d.box(738, y, 84, 40, 'ResBlock', 'net')
    d.box(827, y, 70, 48, ('conv', '4×16×16'), 'net')
    d.box(236, low, 88, 40, ('Down', '48 × 8×8'), 'net')
    d.box(344, low, 96, 46, ('ResBlock', '+ attention'), 'net')
    d.box(440, mid, 108, 62, ('ResBlock', '+ attention', '+ ResBlock'), 'net')
    d.box(534, low, 96, 46, ('ResBlock', '+ attention'), 'net')
    d.box(640, low, 96, 60, ('ResBlock', '+ attention', '+ Up'), 'net')
    for a, b in (((88, y), (108, y)), ((176, y), (192, y)), ((684, y), (696, y)), ((780, y), (792, y)),
                 ((280, low), (296, low)), ((582, low), (592, low))): d.arrow(a, b)
    d.arrow((236, y + 20), (236, low - 20))
    d.arrow((344, low + 23), (344, mid), (386, mid))
    d.arrow((494, mid), (534, mid), (534, low + 23))
    d.arrow((640, low - 30), (640, y + 20))
    d.arrow((280, y), (596, y), kind='data')
    d.arrow((142, y - 20), (142, 162), (738, 162), (738, y - 20), kind='data')
    d.arrow((392, low), (486, low), kind='data')
    d.arrow((264, low - 20), (264, 298), (612, 298), (612, low - 30), kind='data')
    d.text(438, 155, 'skip: 48 channels, put beside those of the up path', 'small')
    d.text(438, y - 7, '48', 'small')
    d.text(438, 291, '48', 'small')
    d.text(438, low - 8, '96', 'small')
    d.text(150, 438, 'down: halve the sides', 'small soft')
    d.text(700, 438, 'up: double the sides', 'small soft')
    for at in ((384, low + 23), (482, mid + 31), (574, low + 23), (680, low + 30)): d.dot(*at, 'cond')
    d.legend(475, ('data', 'net', 'cond'), 'blue arrow: skip connection.  2.3 M parameters in all')
    return d


def first_stage() -> Diagram:
    d = Diagram('first-stage', 880, 400,
                'The first stage: an encoder makes a latent of 4x16x16 numbers from a picture of 3x64x64, a '
                'bottleneck keeps it near a normal distribution or a codebook, a decoder brings the picture back.')
    d.panel(8, 8, 864, 214, 'Autoencoder')
    y = 116
    d.box(56, y, 80, 52, ('*x*', '3×64×64'))
    d.box(182, y, 128, 132, ('Encoder', '32 × 64×64', '64 × 32×32', '96 × 16×16'), 'net', 'encoder')
    d.box(374, 70, 184, 46, ('KL: mean + std × *ε*', '8×16×16 → 4×16×16'), 'op')
    d.box(374, 162, 184, 46, ('VQ: the nearest code', '4×16×16'), 'op')
    d.box(541, y, 92, 52, ('latent', '4×16×16'))
    d.box(674, y, 128, 132, ('Decoder', '96 × 16×16', '64 × 32×32', '32 × 64×64'), 'net', 'decoder')
    d.box(812, y, 80, 52, ('x̂', '3×64×64'))
    d.arrow((96, y), (118, y))
    d.arrow((246, y - 12), (262, y - 12), (262, 70), (282, 70))
    d.arrow((246, y + 12), (262, y + 12), (262, 162), (282, 162))
    d.text(374, y + 5, 'one of the two', 'small soft')
    d.arrow((466, 70), (480, 70), (480, y - 10), (495, y - 10))
    d.arrow((466, 162), (480, 162), (480, y + 10), (495, y + 10))
    d.arrow((587, y), (610, y))
    d.arrow((738, y), (772, y))
    d.panel(8, 230, 864, 132, 'What diffusion sees')
    y = 304
    d.box(541, y, 92, 52, ('raw latent', '4×16×16'))
    d.text(541, y + 46, 'KL: the mean; VQ: before its box', 'small')
    d.box(352, y, 192, 52, ('(raw − shift) × scale', 'one of each a channel'), 'op')
    d.box(132, y, 208, 60, ('*z*, std 1 a channel', '4×16×16 = 1,024 numbers'))
    d.arrow((495, y), (448, y))
    d.arrow((256, y), (236, y))
    for at, line in ((262, 'encode() ends with the scale,'), (282, 'decode() begins by taking it off'),
                     (302, '(VQ: then takes the nearest code).'), (330, '*x* has 12,288: 12 times as many.')):
        d.text(602, at, line, 'small', 'start')
    d.legend(388, ('data', 'net', 'op'), 'shapes: channels × height × width, *f* = 4')
    return d


def two_stages() -> Diagram:
    d = Diagram('two-stages', 880, 580,
                'Stage 1 trains the autoencoder on pictures. Stage 2 keeps it fixed, encodes the '
                'pictures once and trains the UNet and the embedder of the captions on latents. Sampling '
                'runs the UNet many times and the decoder once.')
    d.panel(8, 8, 864, 126, 'Stage 1: train the autoencoder on pictures')
    d.panel(8, 142, 864, 184, 'Stage 2: train UNet and embedder on latents; the autoencoder no longer changes')
    d.panel(8, 334, 864, 204, 'Sampling: the UNet at every step, embedder and decoder once')
    y = 84
    d.box(66, y, 90, 52, ('*x*', '3×64×64'))
    d.box(186, y, 96, 68, 'Encoder', 'net', 'encoder')
    d.box(302, y, 84, 52, ('latent', '4×16×16'))
    d.box(420, y, 96, 68, 'Decoder', 'net', 'decoder')
    d.box(540, y, 90, 52, ('x̂', '3×64×64'))
    d.box(742, y, 232, 70, ('is x̂ like *x*?', 'pixels, and a regulariser', '(or features, discriminator, too)'), 'loss')
    for a, b in ((111, 138), (234, 260), (344, 372), (468, 495), (585, 626)): d.arrow((a, y), (b, y))
    y = 218
    d.box(66, y, 90, 52, ('*x*', '3×64×64'))
    d.box(186, y, 96, 68, 'Encoder', 'frozen', 'encoder')
    d.box(302, y, 84, 52, ('*z*_{0}', '4×16×16'))
    d.box(420, y, 96, 52, ('add noise', '*t*, *ε*'), 'op')
    d.box(540, y, 90, 52, 'UNet', 'net')
    d.box(646, y, 78, 52, ('*ε*_{θ}', '4×16×16'))
    d.box(790, y, 136, 70, ('which noise?', '|*ε* − *ε*_{θ}|²', '(here *v* instead)'), 'loss')
    for a, b in ((111, 138), (234, 260), (344, 372), (468, 495), (585, 607), (685, 722)): d.arrow((a, y), (b, y))
    d.box(66, 292, 90, 40, 'caption *y*', 'cond')
    d.box(302, 292, 116, 44, ('embedder', '(text encoder)'), 'net')
    d.arrow((111, 292), (244, 292), kind='cond')
    d.arrow((360, 292), (540, 292), (540, 244), kind='cond')
    d.text(448, 285, '*c*')
    y = 472
    d.box(66, 392, 90, 40, 'caption *y*', 'cond')
    d.box(302, 392, 116, 44, ('embedder', '(text encoder)'), 'frozen')
    d.arrow((111, 392), (244, 392), kind='cond')
    d.arrow((360, 392), (420, 392), (420, 446), kind='cond')
    d.text(390, 385, '*c*')
    d.box(66, y, 90, 52, ('noise', '4×16×16'))
    d.box(302, y, 84, 52, ('*z*_{t}', '4×16×16'))
    d.box(420, y, 90, 52, 'UNet', 'frozen')
    d.box(540, y, 96, 74, ('one step', 'to the next', 'lower noise', 'level'), 'op')
    d.box(646, y, 78, 52, ('*z*_{0}', '4×16×16'))
    d.box(744, y, 82, 68, 'Decoder', 'frozen', 'decoder')
    d.box(828, y, 70, 52, ('*x*', '3×64×64'))
    for a, b in ((111, 260), (344, 375), (465, 492), (588, 607), (685, 703), (785, 793)): d.arrow((a, y), (b, y))
    d.arrow((540, y + 37), (540, 527), (302, 527), (302, y + 26))
    d.text(420, 520, '20 to 50 times', 'small')
    d.legend(564, ('data', 'net', 'frozen', 'op', 'cond', 'loss'))
    return d


def attention() -> Diagram:
    d = Diagram('attention', 880, 396,
                'Cross-attention: queries from the positions of the picture, keys and values from the '
                'words. Weights are the softmax of the products of queries and keys; the output is a weighted '
                'mean of values.')
    d.panel(8, 8, 864, 132, 'From the picture: 8×8 = 64 positions')
    d.panel(8, 148, 864, 202, 'From the caption: 32 tokens')
    y, k, v = 88, 206, 284
    d.box(52, y, 72, 52, ('*h*', '64×96'))
    d.box(140, y, 64, 40, 'to_q', 'net')
    d.box(228, y, 72, 52, ('*Q*', '64×24'))
    d.box(344, y, 112, 52, ('*Q K*ᵀ / √24', '64×32'), 'op')
    d.box(458, y, 80, 40, 'softmax', 'op')
    d.box(556, y, 80, 52, ('*A*', '64×32'))
    d.box(648, y, 64, 52, ('*A V*', '64×24'), 'op')
    d.box(738, y, 72, 52, ('out', '64×96'), 'net')
    d.box(830, y, 64, 40, '*h* + …', 'op')
    for a, b in ((88, 108), (172, 192), (264, 288), (400, 418), (498, 516), (596, 616), (680, 702), (774, 798)):
        d.arrow((a, y), (b, y))
    d.box(52, 245, 72, 52, ('*c*', '32×128'), 'cond')
    d.box(140, k, 64, 40, 'to_k', 'net')
    d.box(140, v, 64, 40, 'to_v', 'net')
    d.box(228, k, 72, 52, ('*K*', '32×24'))
    d.box(228, v, 72, 52, ('*V*', '32×24'))
    d.arrow((88, 236), (98, 236), (98, k), (108, k), kind='cond')
    d.arrow((88, 254), (98, 254), (98, v), (108, v), kind='cond')
    d.arrow((172, k), (192, k))
    d.arrow((172, v), (192, v))
    d.arrow((264, k), (344, k), (344, y + 26))
    d.arrow((264, v), (648, v), (648, y + 26))
    d.text(362, 190, 'each position asks each word:', 'small', 'start')
    d.text(362, 208, 'a row of *A* holds 32 shares', 'small', 'start')
    d.text(362, 226, 'that add up to 1', 'small', 'start')
    d.text(662, 228, 'a mean of the values,', 'small', 'start')
    d.text(662, 246, 'weighted by those shares', 'small', 'start')
    d.text(662, 284, 'self-attention: the same,', 'small soft', 'start')
    d.text(662, 302, 'with *h* in place of *c*', 'small soft', 'start')
    d.arrow((52, 271), (52, 332), (84, 332), kind='cond', thin=True)
    d.text(92, 337, 'pooled vector 128, the mean of the tokens: to the time embedding, not through attention',
           'small', 'start')
    d.legend(378, ('data', 'net', 'op', 'cond'), 'shapes of one of 4 heads; “out” joins them')
    return d


def guidance() -> Diagram:
    d = Diagram('guidance', 880, 400,
                'Guidance: two predictions from the same noisy latent, without and with the caption. The '
                'guided prediction lies on the line through both, beyond the second.')
    z, u, c = (70, 330), (250, 300), (330, 236)
    def on(w): return u[0] + w*(c[0] - u[0]), u[1] + w*(c[1] - u[1])
    g = on(3)
    d.arrow(u, on(3.7), kind='faint', head=False, dash=True)
    d.arrow(z, u, kind='flow')
    d.arrow(z, c, kind='cond')
    d.arrow(c, g, kind='loss')
    for w, kind in ((0, 'flow'), (1, 'cond'), (3, 'loss')): d.dot(*on(w), kind, 6)
    d.dot(*z, 'data', 7)
    d.text(46, 336, '*z*', 'big')
    d.text(250, 328, 'ẑ_{0}(∅): without it,  *w* = 0', '', 'start')
    d.text(350, 252, 'ẑ_{0}(*c*): with the caption,  *w* = 1', '', 'start')
    d.text(g[0] + 16, g[1] + 20, 'guided,  *w* = 3', 'bold', 'start')
    d.text(16, 34, 'guided = ẑ_{0}(∅) + *w* ( ẑ_{0}(*c*) − ẑ_{0}(∅) )', 'big', 'start')
    d.text(16, 62, 'one network, two answers from the same *z*', 'soft', 'start')
    d.text(640, 180, 'What the difference is:', 'bold', 'start')
    d.text(640, 206, 'by Bayes, the direction', '', 'start')
    d.text(640, 226, 'in which the caption *c*', '', 'start')
    d.text(640, 246, 'becomes more likely,', '', 'start')
    d.text(640, 266, '∇ log *p*(*c* | *z*).', '', 'start')
    d.text(640, 292, '*w* > 1 extrapolates.', '', 'start')
    d.text(16, 384, 'Points are latents of 1,024 numbers, drawn here as two. A sampling step then goes towards '
           'the guided point.', 'small soft', 'start')
    return d


def training_step() -> Diagram:
    d = Diagram('training-step', 880, 446,
                'One training step: for each micro-batch noise, prediction, loss and gradient; then '
                'once: clip the gradient, update the weights, update their moving average.')
    d.panel(8, 8, 864, 220, 'For each micro-batch')
    d.panel(8, 236, 864, 166, 'Once a step')
    y = 120
    d.box(64, y, 88, 52, ('batch *z*_{0}', '4×16×16'))
    d.box(268, 44, 130, 44, ('random *t*, *ε*', 'for each row'), 'op')
    d.box(268, y, 96, 44, 'add noise', 'op')
    d.box(402, y, 96, 56, ('UNet', 'weights *θ*'), 'net')
    d.box(528, y, 78, 52, ('*ε*_{θ}', '4×16×16'))
    d.box(656, y, 108, 52, ('loss', '|*ε* − *ε*_{θ}|²'), 'loss')
    d.box(798, y, 108, 52, ('backward', 'gradient'), 'op')
    d.box(64, 192, 88, 40, 'caption *y*', 'cond')
    d.box(192, 192, 116, 44, ('embedder', 'weights *θ*'), 'net')
    d.box(312, 192, 72, 44, ('*c*', '32×128'), 'cond')
    d.arrow((108, y), (220, y))
    d.arrow((268, 66), (268, y - 22))
    d.arrow((316, y), (354, y))
    d.text(335, y - 9, '*z*_{t}')
    d.arrow((333, 44), (656, 44), (656, y - 26), kind='loss')
    d.text(520, 36, 'the noise *ε* that was added (shipped models: *v*)', 'small')
    d.arrow((450, y), (489, y))
    d.arrow((567, y), (602, y))
    d.arrow((710, y), (744, y), kind='loss')
    d.arrow((108, 192), (134, 192), kind='cond')
    d.arrow((250, 192), (276, 192), kind='cond')
    d.arrow((348, 192), (384, 192), (384, y + 28), kind='cond')
    y = 300
    d.box(798, y, 108, 48, ('gradient *g*', 'added up'))
    d.box(640, y, 110, 48, ('clip', 'norm of *g* ≤ 1'), 'op')
    d.box(488, y, 110, 48, ('AdamW', 'lr of this step'), 'op')
    d.box(316, y, 128, 48, ('new weights *θ*', 'UNet, embedder'))
    d.box(130, y, 140, 48, ('EMA', 'a slow mean of *θ*'), 'op')
    d.arrow((798, 146), (798, y - 24), kind='loss')
    for a, b in ((744, 695), (585, 543), (433, 380), (252, 200)): d.arrow((a, y), (b, y))
    d.arrow((340, y - 24), (340, 252), (420, 252), (420, 148), kind='net')
    d.box(130, 370, 156, 44, ('averaged weights', '2.7 M'))
    d.arrow((130, y + 24), (130, 348))
    d.text(216, 375, 'sampling and evaluation use these', 'small', 'start')
    d.text(434, 214, 'the next step begins with the new weights', 'small', 'start')
    d.legend(430, ('data', 'net', 'op', 'cond', 'loss'))
    return d


def where() -> Diagram:
    d = Diagram('where', 880, 470,
                'Where a condition enters: what has a place in the picture is put beside the latent as '
                'channels; what has none becomes tokens for cross-attention, or a vector added to the time.')
    d.panel(8, 8, 276, 420, 'Has a place: channels')
    d.panel(574, 8, 298, 258, 'Has no place: tokens')
    d.panel(574, 274, 298, 154, 'One for all: a vector')
    for y, a, b in ((72, 'semantic map', '8 × 16×16'), (138, 'picture with a hole', 'picture 4, mask 1: 5 × 16×16'),
                    (204, 'low resolution, ×4', '3 × 16×16'), (270, 'layout, boxes drawn', '9 × 16×16')):
        d.box(130, y, 216, 46, (a, b), 'cond')
        d.arrow((238, y), (262, y), (262, 171), kind='cond', head=False)
    d.box(130, 366, 216, 50, ('*z*_{t}', '4 × 16×16'))
    d.box(342, 260, 84, 52, ('concat', 'channels'), 'op')
    d.arrow((262, 171), (342, 171), (342, 234), kind='cond')
    d.arrow((238, 366), (342, 366), (342, 286))
    d.text(20, 332, 'beside the latent:', 'small soft', 'start')
    d.box(470, 260, 104, 112, ('UNet', 'conv_in takes', 'all channels'), 'net')
    d.arrow((384, 260), (418, 260))
    d.box(470, 110, 84, 52, ('*ε*_{θ}', '4×16×16'))
    d.arrow((470, 204), (470, 136))
    for y, a, b in ((72, 'caption', '32 × 128'), (138, 'layout, as words', '48 × 128'), (204, 'class', '1 × 128')):
        d.box(756, y, 196, 46, (a, b), 'cond')
        d.arrow((658, y), (628, y), (628, 230), kind='cond', head=False)
    d.arrow((628, 230), (522, 230), kind='cond')
    d.text(598, 252, 'cross-attention', 'small', 'start')
    d.box(756, 330, 196, 46, ('caption, averaged', 'pooled vector 128'), 'cond')
    d.box(756, 394, 196, 40, 'timestep *t*', 'cond')
    d.box(470, 376, 104, 52, ('time MLP', 'and add'), 'net')
    d.arrow((658, 330), (600, 330), (600, 366), (522, 366), kind='cond')
    d.arrow((658, 394), (522, 394), kind='cond')
    d.arrow((470, 350), (470, 316))
    d.legend(456, ('data', 'net', 'op', 'cond'), 'shapes of the shipped models, one item of a batch')
    return d


ALL = dict(whole=whole, chain=chain, step=step, unet=unet, attention=attention, guidance=guidance, where=where,
           **{'first-stage': first_stage, 'two-stages': two_stages, 'training-step': training_step},
           **{name: partial(whole, name) for name in HERE})


def main(what: str) -> list[str]: # what is wrong
    wrong = []
    for name, text in {name: make().svg() for name, make in ALL.items()}.items(): # all of them, or none
        path = IMAGES/f'{name}.svg'
        if what == 'write': path.write_text(text, encoding='utf-8', newline='\n')
        elif not path.is_file() or path.read_text(encoding='utf-8') != text:
            wrong.append(f'{path.relative_to(ROOT).as_posix()} is not what .ci/diagrams.py draws: run it with `write`')
    return wrong


if __name__ == '__main__':
    what = sys.argv[1] if len(sys.argv) > 1 else 'check'
    if what not in ('write', 'check'): sys.exit('usage: diagrams.py write | check')
    wrong = main(what)
    for w in wrong: print('diagrams:', w, file=sys.stderr)
    if not wrong: print(f'diagrams: {len(ALL)} as drawn')
    sys.exit(bool(wrong))
