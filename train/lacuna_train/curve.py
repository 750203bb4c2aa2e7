"""Draws the losses of a training log as an SVG."""
import json
import math
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 300, 46, 16, 120, 36
LINES = (("text", "text", "#1f5fa8"), ("look", "look-ahead", "#8a8a8a"), ("answer", "answers", "#c0392b"),
         ("reply", "replies, evicted", "#2e8b57"))
COLA_LINES = (("recon", "reconstruction", "#1f5fa8"), ("masked", "masked", "#2e8b57"), ("flow", "flow", "#c0392b"))
TOP_LOSS = 6.0  # the first seconds lie above and are cut


def svg(entries, total_seconds):
    lines, top = LINES, TOP_LOSS
    if "text" not in entries[0]:
        late = [e.get(k, 0) for k, _, _ in COLA_LINES for e in entries[len(entries) // 20:]]
        lines, top = COLA_LINES, float(min(9, math.ceil(max(late))))
    across = lambda s: LEFT + (WIDTH - LEFT - RIGHT) * s / total_seconds
    down = lambda loss: TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(loss, top) / top)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for loss in range(int(top) + 1):
        y = down(loss)
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>')
    step = max(50, round(total_seconds / 8 / 50) * 50) if total_seconds > 100 else 5
    for second in range(0, int(total_seconds) + 1, step):
        out.append(f'<text x="{across(second):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{second}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">seconds of training</text>')
    out.append(f'<text x="{LEFT}" y="11">{"nats a token" if lines is LINES else "nats a token; flow: squared error a dim"}</text>')
    label = 0.0
    for key, name, colour in lines:
        # 0 stands for "none of these in this stretch of the log".
        points = [(e["seconds"], e[key]) for e in entries if 0 < e.get(key, 0) < 9]
        if key == "look":  # before it is trained it says nothing
            points = [p for p in points if p[1] < TOP_LOSS]
        if not points:
            continue
        path = " ".join(f"{across(s):.1f},{down(v):.1f}" for s, v in points)
        label = max(label + 13, down(points[-1][1]) + 4)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                   f'<text x="{WIDTH - RIGHT + 6}" y="{label:.1f}" fill="{colour}">{name} {points[-1][1]:.2f}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def draw(args):
    events = [json.loads(line) for line in Path(args.log).read_text(encoding="utf-8").splitlines()]
    # Self-checks have losses, but no time.
    entries = [e for e in events if ("text" in e or "recon" in e) and "seconds" in e]
    if not entries:
        raise ValueError(f"{args.log} holds no losses")
    Path(args.out).write_text(svg(entries, entries[-1]["seconds"]), encoding="utf-8")
