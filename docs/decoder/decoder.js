// Evaluates what `kvmfault emit json` writes. Register values are BigInt throughout.
"use strict";

const kvmfault = (() => {
  const hex = (n) => "0x" + n.toString(16);
  const field = (at, regs) => (regs[at.register] >> BigInt(at.lo)) & ((1n << BigInt(at.width)) - 1n);

  function holds(truth, regs) {
    if (truth.all) return truth.all.every((part) => holds(part, regs));
    if (truth.any) return truth.any.some((part) => holds(part, regs));
    if (truth.not) return !holds(truth.not, regs);
    return truth.in.includes(hex(field(truth, regs)));
  }

  function valueOf(value, regs) {
    let made = BigInt(value.const);
    for (const term of value.or) {
      const bits = regs[term.register] & BigInt(term.mask);
      const shifted = term.shift < 0 ? bits << BigInt(-term.shift) : bits >> BigInt(term.shift);
      made |= term.table ? BigInt(term.table[Number(shifted)]) : shifted;
    }
    return BigInt.asUintN(64, made);
  }

  // The fields that decide: of a conjunction that fails the first part that fails, and so on.
  function deciding(truth, regs) {
    if (truth.not) return deciding(truth.not, regs);
    const parts = truth.all || truth.any;
    if (!parts) return [truth];
    const decisive = Boolean(truth.any);
    const first = parts.find((part) => holds(part, regs) === decisive);
    return first ? deciding(first, regs) : parts.flatMap((part) => deciding(part, regs));
  }

  function describe(at, regs, target) {
    const value = field(at, regs);
    const register = target.registers.find((r) => r.name === at.register);
    const declared = register.fields.find((f) => f.name === at.field && f.lo === at.lo);
    const meaning = declared && at.width > 1 ? declared.meanings[hex(value)] : undefined;
    const place = at.width === 1 ? `bit ${at.lo}` : `bits ${at.lo + at.width - 1}:${at.lo}`;
    return `${at.field} (${place}) = ${at.width === 1 ? value : hex(value)}${meaning ? " " + meaning : ""}`;
  }

  function why(truth, regs, target) {
    return [...new Set(deciding(truth, regs).map((at) => describe(at, regs, target)))].join(", ") || "always";
  }

  function answer(of, regs, target) {
    if (of.gap) return { known: false, answer: null, why: of.gap };
    if (of.value && of.valid) {
      const exists = holds(of.valid.truth, regs);
      return { known: true, answer: exists ? hex(valueOf(of.value, regs)) : null, why: why(of.valid.truth, regs, target) };
    }
    if (of.value) return { known: true, answer: hex(valueOf(of.value, regs)), why: "" };
    return { known: true, answer: holds(of.truth, regs), why: why(of.truth, regs, target) };
  }

  // given: register name -> BigInt. The result names facts and accessors as `kvmfault decode --json` does.
  function decode(definitions, target, given) {
    const regs = {};
    for (const register of target.registers) regs[register.name] = BigInt(target.defaults[register.name] || 0);
    for (const [name, value] of Object.entries(given)) {
      regs[name] = value;
      for (const [register, mark] of Object.entries(target.given[name] || {})) regs[register] |= BigInt(mark);
    }
    const facts = {};
    const named = Object.values(definitions.optional).flatMap(({ valid, value }) => [valid, value]);
    for (const [name, { valid, value }] of Object.entries(definitions.optional)) {
      const exists = target.facts[valid];
      facts[name] = answer(exists.gap ? exists : { ...target.facts[value], valid: exists }, regs, target);
    }
    const described = target.facts.mmio_valid.truth && holds(target.facts.mmio_valid.truth, regs);
    for (const [name, { sort }] of Object.entries(definitions.facts)) {
      if (sort !== "truth" || named.includes(name) || (name.startsWith("mmio_") && !described)) continue;
      facts[name] = answer(target.facts[name], regs, target);
    }
    const accessors = {};
    for (const [name, of] of Object.entries(target.accessors)) accessors[name] = answer(of, regs, target);
    return { regs, facts, accessors, possible: holds(target.reachable, regs) };
  }

  return { decode, field, hex };
})();

(() => {
  const place = document.getElementById("fault-decoder");
  if (!place) return;
  const definitions = window.KVMFAULT;
  const make = (tag, text, ...children) => {
    const made = document.createElement(tag);
    if (text !== null) made.textContent = text;
    made.append(...children);
    return made;
  };
  const choice = make("select", null, ...definitions.targets.map((t) => make("option", t.name)));
  choice.setAttribute("aria-label", "target");
  const about = make("p", "");
  const inputs = make("div", null);
  const result = make("div", null);
  result.setAttribute("aria-live", "polite");
  place.append(choice, about, inputs, result);
  const target = () => definitions.targets.find((t) => t.name === choice.value);

  function table(title, head, rows) {
    const cells = (tag, row) => make("tr", null, ...row.map((text) => make(tag, text)));
    const body = make("tbody", null, ...rows.map((row) => cells("td", row)));
    const whole = make("table", null, make("thead", null, cells("th", head)), body);
    const around = make("div", null, whole);
    around.className = "decoder-table";
    result.append(make("h2", title), around);
  }

  function show() {
    result.replaceChildren();
    const given = {};
    for (const input of inputs.querySelectorAll("input")) {
      const text = input.value.trim();
      const register = target().registers.find((r) => r.name === input.name);
      const good = /^(0x[0-9a-f]+|0b[01]+|0|[1-9][0-9]*)$/i.test(text) && BigInt(text) >> BigInt(register.width) === 0n;
      const wrong = text !== "" && !good;
      input.setCustomValidity(wrong ? `0x…, 0b… or decimal, at most ${register.width} bits` : "");
      input.setAttribute("aria-invalid", String(wrong));
      if (wrong) result.append(make("p", `${input.name}: expected 0x…, 0b… or decimal, of at most ${register.width} bits`));
      else if (text !== "") given[input.name] = BigInt(text);
    }
    location.replace("#" + new URLSearchParams({ target: choice.value, ...Object.fromEntries(
      Object.entries(given).map(([name, value]) => [name, kvmfault.hex(value)])) }));
    if (!Object.keys(given).length) return;
    const found = kvmfault.decode(definitions, target(), given);
    if (!found.possible) result.append(make("p", "Hardware reports no such values, as far as the definitions know."));
    const word = (a) => (a === true ? "yes" : a === false ? "no" : a === null ? "none" : a);
    const known = Object.entries(found.facts).filter(([, f]) => f.known);
    const unknown = Object.entries(found.facts).filter(([, f]) => !f.known);
    const rows = known.map(([name, f]) => [name, word(f.answer), f.why]);
    table("Facts", ["fact", "answer", "decided by"], rows.concat(unknown.map(([name, f]) => [name, "unknown", f.why])));
    const own = Object.entries(found.accessors).map(([name, f]) => [name, word(f.answer), target().accessors[name].text]);
    if (own.length) table("The kernel's accessors", ["accessor", "value", "definition"], own);
    for (const register of target().registers.filter((r) => r.name in given)) {
      const fields = [...register.fields].sort((a, b) => b.hi - a.hi).map((f) => {
        const value = kvmfault.field({ register: register.name, lo: f.lo, width: f.hi - f.lo + 1 }, found.regs);
        const bits = f.hi === f.lo ? `${f.lo}` : `${f.hi}:${f.lo}`;
        return [f.name, bits, kvmfault.hex(value), f.meanings[kvmfault.hex(value)] || ""];
      });
      table(`${register.name} = ${kvmfault.hex(given[register.name])}`, ["field", "bits", "value", "meaning"], fields);
    }
  }

  function choose(values) {
    about.textContent = target().about;
    inputs.replaceChildren(...target().registers.slice(0, -1).map((register) => {
      const input = make("input", null);
      Object.assign(input, { name: register.name, value: values.get(register.name) || "", spellcheck: false });
      input.placeholder = register.name === target().code ? "the value to decode" : "not given";
      input.addEventListener("input", show);
      return make("label", null, make("span", register.name), input);
    }));
    show();
  }

  const asked = new URLSearchParams(location.hash.slice(1));
  if (definitions.targets.some((t) => t.name === asked.get("target"))) choice.value = asked.get("target");
  choice.addEventListener("change", () => choose(new URLSearchParams()));
  choose(asked);
})();
