// The drill-down: each prompt's steps are read and drawn when it is opened. Texts are only ever set as text.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/ /g, "·");

  for (const section of document.querySelectorAll("[data-drill]")) {
    const chapter = section.dataset.drill;
    let texts = null;
    const textOf = (run, token) => {
      texts ??= read(`texts-${chapter}`);
      return texts[run][token] ?? `<${token}>`;
    };

    const drawTree = (step, run) => {
      const [, nodes, tokens, parents, , probs] = step;
      const kept = new Set(nodes);
      const below = tokens.map(() => []);
      parents.forEach((parent, node) => parent >= 0 && below[parent].push(node));
      const list = (node) => {
        const items = make("ul");
        for (const child of below[node]) {
          const item = make("li");
          const isKept = kept.has(child);
          item.append(make("span", `token ${isKept ? "accepted" : "rejected"}`, visible(textOf(run, tokens[child]))));
          const chance = probs ? `, p = ${probs[child].toPrecision(2)}` : "";
          item.append(` ${isKept ? "accepted" : "rejected"}${chance}`);
          if (below[child].length) item.append(list(child));
          items.append(item);
        }
        return items;
      };
      return list(0);
    };

    const describe = (panel, answer, index, run) => {
      const step = answer.steps[index];
      const [emitted, nodes, tokens, , milliseconds] = step;
      const accepted = nodes.length - 1;
      panel.hidden = false;
      panel.replaceChildren(
        make("p", "", `${answer.name}, step ${index + 1} of ${answer.steps.length}: ${tokens.length - 1} drafted, ` +
          `${accepted} accepted, ${emitted.length} emitted in ${milliseconds} ms`),
      );
      const last = make("p");
      last.append("the target's own: ", make("code", "", visible(textOf(run, emitted.at(-1)))));
      panel.append(tokens.length > 1 ? drawTree(step, run) : make("p", "", "nothing was drafted"), last);
    };

    const drawSteps = (answer, run, panel) => {
      const line = make("div", "answer");
      const spans = answer.steps.map((step, index) => {
        const [emitted, nodes, tokens, parents] = step;
        const span = make("span", "step");
        span.tabIndex = index === 0 ? 0 : -1;
        span.setAttribute("role", "button");
        emitted.forEach((token, i) =>
          span.append(make("span", `token ${i < nodes.length - 1 ? "accepted" : "own"}`, textOf(run, token))));
        const kept = new Set(nodes);
        tokens.forEach((token, node) => {
          if (node && !kept.has(node) && kept.has(parents[node]))
            span.append(make("span", "token rejected", visible(textOf(run, token))));
        });
        const show = () => {
          for (const other of line.querySelectorAll(".chosen")) other.classList.remove("chosen");
          span.classList.add("chosen");
          describe(panel, answer, index, run);
        };
        span.addEventListener("mouseenter", show);
        span.addEventListener("focus", show);
        span.addEventListener("click", show);
        return span;
      });
      line.append(...spans);
      line.addEventListener("keydown", (event) => {
        const at = spans.indexOf(document.activeElement);
        const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
        if (at < 0 || to === undefined || !spans[to]) return;
        event.preventDefault();
        spans[at].tabIndex = -1;
        spans[to].tabIndex = 0;
        spans[to].focus();
      });
      return line;
    };

    const open = (details) => {
      const body = details.querySelector("div");
      if (body.childElementCount) return;
      const question = read(details.dataset.source);
      const panel = make("div", "detail");
      panel.hidden = true;
      panel.setAttribute("aria-live", "polite");
      question.turns.forEach((turn, number) => {
        if (question.turns.length > 1) body.append(make("h4", "", `Turn ${number + 1}`));
        if (turn.prompt.length) {
          const prompt = make("details");
          prompt.append(make("summary", "", `prompt, ${turn.prompt.length} tokens`),
            make("div", "prompt", turn.prompt.map((token) => textOf(question.run, token)).join("")));
          body.append(prompt);
        }
        for (const answer of turn.answers) {
          const gain = answer.gain;
          const seconds = `${answer.wall.toFixed(2)} s${answer.rows > 1 ? ` for ${answer.rows} rows` : ""}`;
          body.append(make("h4", "", `${answer.name}: ${seconds}${gain ? `, ${gain.toFixed(2)}x` : ""}`));
          body.append(answer.steps ? drawSteps(answer, question.run, panel)
            : make("div", "answer", answer.tokens.map((token) => textOf(question.run, token)).join("")));
        }
      });
      body.append(panel);
    };

    const list = section.querySelector(".questions");
    const all = [...list.querySelectorAll(".question")];
    for (const details of all) details.addEventListener("toggle", () => details.open && open(details));

    const search = section.querySelector("input[type=search]");
    const category = section.querySelector("select[name=category]");
    const order = section.querySelector("select[name=order]");
    const count = section.querySelector(".count");
    const refresh = () => {
      const words = search.value.trim().toLowerCase();
      let shown = 0;
      for (const details of all) {
        const fits = (!category.value || details.dataset.category === category.value) &&
          (!words || details.querySelector("summary").textContent.toLowerCase().includes(words));
        details.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${all.length} prompts`;
    };
    const sort = () => {
      const sign = { slowest: 1, fastest: -1 }[order.value];
      const sorted = sign ? [...all].sort((a, b) => sign * (a.dataset.gain - b.dataset.gain)) : all;
      list.replaceChildren(...sorted);
    };
    search.addEventListener("input", refresh);
    category.addEventListener("change", refresh);
    order.addEventListener("change", sort);
    section.querySelector("input[type=checkbox]").addEventListener("change", (event) =>
      section.classList.toggle("show-rejected", event.target.checked));
    section.querySelector(".tools").hidden = false;
    refresh();
  }
})();
